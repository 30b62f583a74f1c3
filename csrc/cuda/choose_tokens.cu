// choose_tokens: argmax, or Gumbel-max over the tokens that top_k and top_p keep.
//
// One block owns one row and passes over it a few times; after the first pass the row lies in the L2 cache.
// Nothing is sorted. A token's rank is one integer: the order-preserving image of its logit, then its id with
// lower ids ranking higher, so that ranks are distinct and every limit becomes "ranks from here on are kept".
// That rank is found by radix selection: a histogram over the next digit of the rank, of counts for top_k and
// of probabilities for top_p, until all digits are known. Probabilities are summed as integers, so that the
// order of the additions changes nothing. All but the first digit of the first histogram concern few tokens.
#include "args.h"
#include "copy.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "philox.cuh"
#include "reduce.cuh"

namespace cerberus {
namespace {

// 64 KB of loads under way in a block, because there are no more blocks than rows: 64 rows are to keep the
// memory of 132 multiprocessors busy, which takes some 36 KB for each row.
constexpr int kGreedyThreads = 1024, kGreedyPacks = 4;

constexpr int kThreads = 512;   // 1024 would leave 64 registers each, too few for the noise
constexpr int kDigitBits = 11;  // 3 digits cover a bfloat16 logit and an id below 2^17
constexpr int kDigits = 1 << kDigitBits;
// Copies of the histogram, which neighbouring lanes use in turn: most logits of a row share a few digits, and
// additions to one number wait for each other. More would not fit into 48 KB.
constexpr int kCopies = 2;

// Greater for the greater logit; 0 for what is not a number, which ranks below everything else.
__device__ inline uint32_t order_image(float x) {
  if (is_nan(x)) return 0;
  const uint32_t bits = float_bits(x == 0.0f ? 0.0f : x);  // -0 and 0 are equal
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A 16-bit logit has this many low bits in its float32 image that say nothing.
template <typename T>
constexpr int kUnusedBits = 0;
template <>
constexpr int kUnusedBits<bf16> = 16;
template <>
constexpr int kUnusedBits<fp16> = 13;

// What sampling needs beyond the arguments, computed on the host.
struct RankLayout {
  int id_bits;       // the low bits of a rank: vocab - 1 - id
  float mass_scale;  // the best token's weight in fixed point, such that the vocabulary's sum fits 63 bits
};

// One row: its logits and what the steps of the sampling know about them.
template <typename T, int kVector>
struct Row {
  const T* logits;
  int64_t vocab;
  RankLayout layout;
  float temperature, max;

  // f(id, logit) for the logits of this thread.
  template <typename F>
  __device__ void for_each(F f) const {
    for_each_in_row<kThreads, kVector>(logits, vocab, f);
  }
  __device__ uint64_t rank(int64_t id, float logit) const {
    const uint64_t image = order_image(logit) >> kUnusedBits<T>;
    return image << layout.id_bits | static_cast<uint64_t>(vocab - 1 - id);
  }
  // (logit - max) / temperature, also of equal infinities.
  __device__ float shifted(float logit) const { return logit == max ? 0.0f : (logit - max) / temperature; }
  __device__ uint64_t mass(float logit) const {
    return static_cast<uint64_t>(expf(shifted(logit)) * layout.mass_scale);
  }
};

// A token and its value. Better is the greater value, then the lower id.
template <typename Value>
struct Choice {
  Value value;
  int32_t id;
};
struct Better {
  template <typename Value>
  __device__ Choice<Value> operator()(Choice<Value> a, Choice<Value> b) const {
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
  }
};
template <typename Value>
__device__ inline Choice<Value> no_choice() {
  return {-INFINITY, INT32_MAX};
}
// The block's choice; token 0 where there was nothing to choose from.
template <int kThreads, typename Value>
__device__ inline void write_choice(Choice<Value> choice, int64_t* token) {
  choice = block_reduce<kThreads>(choice, Better{});
  if (threadIdx.x == 0) *token = choice.id == INT32_MAX ? 0 : choice.id;
}

// A thread looks for its best pack first and only then into it, which halves the work on a logit.
template <typename T, int kVector>
__global__ void __launch_bounds__(kGreedyThreads, 1) greedy_kernel(const ChooseTokensArgs a) {
  wait_for_previous_launch();
  allow_next_launch();
  const T* logits = static_cast<const T*>(a.logits) + blockIdx.x * a.vocab;
  Choice<float> best_pack = no_choice<float>();  // its greatest logit, its first id
  for_each_pack<kGreedyThreads, kVector, kGreedyPacks>(
      logits, a.vocab, [&](int64_t first, const float (&x)[kVector]) {
        float greatest = x[0];
#pragma unroll
        for (int i = 1; i < kVector; ++i)
          greatest = fmaxf(greatest, x[i]);  // passes over what is not a number
        best_pack = Better{}(best_pack, {greatest, static_cast<int32_t>(first)});
      });
  Choice<float> best = no_choice<float>();
  if (best_pack.id != INT32_MAX) {
    float x[kVector];
    load<kVector>(logits + best_pack.id).unpack(x);
#pragma unroll
    for (int i = 0; i < kVector; ++i) best = Better{}(best, {x[i], best_pack.id + i});
  }
  write_choice<kGreedyThreads>(best, a.tokens + blockIdx.x);
}

// Shared memory of one radix selection.
struct Selection {
  // The sums of 64 bits as two words each: a device adds 32 bits to shared memory in one instruction, and 64
  // bits by trying until nobody else was quicker.
  uint32_t low[kDigits][kCopies], high[kDigits][kCopies];
  uint64_t above;
  int digit;

  __device__ void clear() {
    for (int i = threadIdx.x; i < kDigits * kCopies; i += kThreads) {
      low[i / kCopies][i % kCopies] = 0;
      high[i / kCopies][i % kCopies] = 0;
    }
    if (threadIdx.x == 0) digit = -1;
  }
  __device__ void add(int to, uint64_t amount) {
    const int copy = threadIdx.x % kCopies;
    const uint32_t small = static_cast<uint32_t>(amount);
    const uint32_t before = atomicAdd(&low[to][copy], small);
    // Whoever makes the lower word wrap around carries.
    const uint32_t carried = static_cast<uint32_t>(amount >> 32) + (before + small < small ? 1 : 0);
    if (carried != 0) atomicAdd(&high[to][copy], carried);
  }
  __device__ uint64_t sum(int of) const {
    uint64_t total = 0;
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy)
      total += static_cast<uint64_t>(high[of][copy]) << 32 | low[of][copy];
    return total;
  }
};

// The lowest rank >= floor such that the ranks above it hold less than `limit` of `amount`: the last rank to
// be kept. `floor` where all from there on hold less than `limit` together.
template <typename T, int kVector, typename Amount>
__device__ uint64_t lowest_kept_rank(const Row<T, kVector>& row, uint64_t floor, uint64_t limit,
                                     Selection& chosen, Amount amount) {
  uint64_t prefix = 0;  // of the rank looked for: its digits so far
  uint64_t above = 0;   // the amount that ranks with a greater prefix hold
  for (int low = 32 - kUnusedBits<T> + row.layout.id_bits; low > 0;) {
    const int width = low < kDigitBits ? low : kDigitBits;
    low -= width;
    chosen.clear();
    __syncthreads();
    row.for_each([&](int64_t id, float logit) {
      const uint64_t rank = row.rank(id, logit);
      if (rank < floor || rank >> (low + width) != prefix) return;
      chosen.add(static_cast<int>(rank >> low & ((1 << width) - 1)), amount(logit));
    });
    __syncthreads();

    // Thread t owns the kOwn digits that are greatest after those of thread t - 1. One of them is where the
    // amount counted from above reaches the limit.
    constexpr int kOwn = kDigits / kThreads;
    const int greatest = kDigits - 1 - static_cast<int>(threadIdx.x) * kOwn;
    uint64_t own = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) own += chosen.sum(greatest - i);
    uint64_t before = above + block_sum_before<kThreads>(own);
    if (before < limit && before + own >= limit) {
      int digit = greatest;
      while (before + chosen.sum(digit) < limit) before += chosen.sum(digit--);
      chosen.digit = digit;
      chosen.above = before;
    }
    __syncthreads();
    if (chosen.digit < 0) return floor;
    prefix = prefix << width | static_cast<uint64_t>(chosen.digit);
    above = chosen.above;
    __syncthreads();  // all have read them before they are set again
  }
  return prefix;
}

// With the numbers that lie on the device.
__device__ inline ChooseTokensArgs with_numbers(ChooseTokensArgs a) {
  if (a.numbers == nullptr) return a;
  a.seed = static_cast<uint64_t>(a.numbers[0]);
  a.top_k = a.numbers[1];
  const uint64_t bits = static_cast<uint64_t>(a.numbers[2]);
  a.temperature = float_of_bits(static_cast<uint32_t>(bits));
  a.top_p = float_of_bits(static_cast<uint32_t>(bits >> 32));
  return a;
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, 1)
    sample_kernel(const ChooseTokensArgs given, const RankLayout layout) {
  __shared__ Selection selection;
  wait_for_previous_launch();
  allow_next_launch();
  const ChooseTokensArgs a = with_numbers(given);
  Row<T, kVector> row = {static_cast<const T*>(a.logits) + blockIdx.x * a.vocab, a.vocab, layout,
                         a.temperature, -INFINITY};
  float max = -INFINITY;
  // fmaxf passes over what is not a number.
  row.for_each([&](int64_t, float logit) { max = fmaxf(max, logit); });
  row.max = block_reduce<kThreads>(max, Max{});

  uint64_t floor = uint64_t{1} << layout.id_bits;  // the lowest rank of a number
  if (a.top_k > 0 && a.top_k < a.vocab) {
    floor = lowest_kept_rank(row, floor, static_cast<uint64_t>(a.top_k), selection,
                             [](float) { return uint64_t{1}; });
  }
  if (a.top_p < 1.0f) {
    uint64_t mass = 0;
    row.for_each([&](int64_t id, float logit) {
      if (row.rank(id, logit) >= floor) mass += row.mass(logit);
    });
    mass = block_reduce<kThreads>(mass, Sum{});
    // Kept are those with less than top_p of the mass above them: less than the next integer. The best one
    // stays.
    const uint64_t limit =
        static_cast<uint64_t>(ceil(static_cast<double>(a.top_p) * static_cast<double>(mass)));
    floor = lowest_kept_rank(row, floor, limit > 0 ? limit : 1, selection,
                             [&](float logit) { return row.mass(logit); });
  }

  // The choice is made in double precision, as on a CPU: a rounding that differs would be another token. Most
  // tokens are out of the question, though. An estimate in float32 says which; near the best it is good to
  // 1e-4, and where the temperature is so low that the noise vanishes in the rounding of a double, it can be
  // as far off as that rounding.
  const float margin = 1e-3f + fabsf(row.max) / row.temperature * 1e-15f;
  float best_estimate = -INFINITY;
  Choice<double> best = no_choice<double>();
  // A thread takes four tokens at a time: those whose noise comes from one counter.
  const uint64_t position = static_cast<uint64_t>(a.positions[blockIdx.x]);
  for (int64_t first = static_cast<int64_t>(threadIdx.x) * 4; first < a.vocab; first += kThreads * 4) {
    float logit[4];
    bool kept[4], any = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      logit[i] = first + i < a.vocab ? to_float(row.logits[first + i]) : NAN;
      kept[i] = first + i < a.vocab && row.rank(first + i, logit[i]) >= floor;
      any |= kept[i];
    }
    if (!any) continue;
    const PhiloxWords noise =
        philox(a.seed, static_cast<uint32_t>(first / 4), static_cast<uint32_t>(position),
               static_cast<uint32_t>(position >> 32), 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!kept[i]) continue;
      const float estimate = row.shifted(logit[i]) + gumbel_estimate(noise.word[i]);
      if (estimate < best_estimate - margin) continue;
      best_estimate = fmaxf(best_estimate, estimate);
      const double value = static_cast<double>(logit[i]) / static_cast<double>(a.temperature);
      best = Better{}(best, {value + gumbel(noise.word[i]), static_cast<int32_t>(first + i)});
    }
  }
  write_choice<kThreads>(best, a.tokens + blockIdx.x);
}

RankLayout rank_layout(int64_t vocab) {
  RankLayout layout = {0, 0.0f};
  while (int64_t{1} << layout.id_bits < vocab) ++layout.id_bits;
  // At most 2^44: less than 2^-44 of the best is nothing even summed over the largest vocabulary.
  const int bits = layout.id_bits < 18 ? 44 : 62 - layout.id_bits;
  layout.mass_scale = static_cast<float>(uint64_t{1} << bits);
  return layout;
}

}  // namespace

cudaError_t choose_tokens_cuda(const ChooseTokensArgs& a, cudaStream_t stream) {
  if (a.vocab > kMaxChosenVocab) return cudaErrorInvalidValue;
  return dispatch_vector(
      a.dtype, a.vocab,
      [&](auto element, auto vector) {
        using T = decltype(element);
        if (a.temperature == 0.0f)
          return launch(greedy_kernel<T, vector()>, overlapping(a.rows, kGreedyThreads), stream, a);
        return launch(sample_kernel<T, vector()>, overlapping(a.rows, kThreads), stream, a,
                      rank_layout(a.vocab));
      },
      a.logits);
}

}  // namespace cerberus
