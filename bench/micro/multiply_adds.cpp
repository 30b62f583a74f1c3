// Multiply-adds a second of all threads together, of bfloat16 and of float32, in a loop over registers: what
// no product can exceed. ./multiply_adds THREADS -> two numbers.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr long kTurns = 4'000'000;
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

template <typename Step>
double per_second(int threads, int lanes, const Step& step) {
  double best = 0;
  for (int repeat = 0; repeat < 9; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> all;
    for (int i = 0; i < threads; ++i)
      all.emplace_back([&] {
        Vec sums[kChains] = {};
        for (long turn = 0; turn < kTurns; ++turn) {
#pragma GCC unroll 12
          for (Vec& sum : sums) sum = step(sum);
          KEEP(sums);
        }
      });
    for (std::thread& one : all) one.join();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(kTurns) * kChains * lanes * threads / took.count());
  }
  return best;
}

}  // namespace

int main(int, char** arguments) {
  const int threads = std::atoi(arguments[1]), lanes = sizeof(Vec) / sizeof(float);
  // Lambdas, not the functions themselves, which would be called by their addresses.
  const double pairs = per_second(threads, kPair * lanes, [](Vec sum) { return add_pair(sum); });
  const double floats = per_second(threads, lanes, [](Vec sum) { return add(sum); });
  std::printf("%.4g %.4g\n", pairs, floats);
}
