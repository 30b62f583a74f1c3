// Multiply-adds a second of all threads together, of pairs of bfloat16 or of float32, in a loop over
// registers: what no product can exceed. A library for linear.py.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

namespace {

constexpr int kChains = 12;  // more than the latency of an instruction times two

// The sums are changed, for all that the compiler knows: else it would see that they are equal, and keep one.
#define KEEP(s)                                                                                      \
  asm volatile(""                                                                                    \
               : "+x"(s[0]), "+x"(s[1]), "+x"(s[2]), "+x"(s[3]), "+x"(s[4]), "+x"(s[5]), "+x"(s[6]), \
                 "+x"(s[7]), "+x"(s[8]), "+x"(s[9]), "+x"(s[10]), "+x"(s[11]))

#if defined(__AVX512F__)
using Vec = __m512;
Vec add(Vec sum) { return _mm512_fmadd_ps(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f), sum); }
#else
using Vec = __m256;
Vec add(Vec sum) { return _mm256_fmadd_ps(_mm256_set1_ps(0.5f), _mm256_set1_ps(0.5f), sum); }
#endif
#if defined(__AVX512BF16__)
constexpr int kPair = 2;
Vec add_pair(Vec sum) {
  const __m512bh half = (__m512bh)_mm512_set1_epi16(0x3f00);
  return _mm512_dpbf16_ps(sum, half, half);
}
#else
constexpr int kPair = 1;
Vec add_pair(Vec sum) { return add(sum); }
#endif

// Seconds that the slowest thread takes; each measures itself, so that starting them does not count.
template <typename Step>
double seconds(int threads, long turns, const Step& step) {
  std::vector<double> took(threads);
  std::vector<std::thread> all;
  for (double& mine : took)
    all.emplace_back([&] {
      Vec sums[kChains] = {};
      const auto start = std::chrono::steady_clock::now();
      for (long turn = 0; turn < turns; ++turn) {
#pragma GCC unroll 12
        for (Vec& sum : sums) sum = step(sum);
        KEEP(sums);
      }
      mine = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    });
  for (std::thread& one : all) one.join();
  return *std::max_element(took.begin(), took.end());
}

}  // namespace

// A second, of all threads together; a call takes about a millisecond.
extern "C" double multiply_adds(int threads, bool pairs) {
  constexpr long kTurns = 250'000;
  const int lanes = sizeof(Vec) / sizeof(float) * (pairs ? kPair : 1);
  // Lambdas, not the functions themselves, which would be called by their addresses.
  const double took = pairs ? seconds(threads, kTurns, [](Vec sum) { return add_pair(sum); })
                            : seconds(threads, kTurns, [](Vec sum) { return add(sum); });
  return static_cast<double>(kTurns) * kChains * lanes * threads / took;
}
