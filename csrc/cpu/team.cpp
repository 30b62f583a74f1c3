#include "cpu/team.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace cerberus {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr auto kSpin = microseconds(50);
// A wait for the others' last tasks that takes so long means that one of them is not running. The caller then
// works alone, so long that the lost time is a small share of it.
constexpr auto kLate = microseconds(1000);
constexpr auto kAlone = milliseconds(30);
constexpr int64_t kMaxTasks = (int64_t{1} << 20) - 1;  // of one round, see Share

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Spins until done(), at most kSpin; returns whether it is.
template <typename Done>
bool spin(const Done& done) {
  if (done()) return true;
  const auto end = Clock::now() + kSpin;
  for (;;) {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      pause();
    }
    if (Clock::now() > end) return done();
  }
}

// A condition that threads sleep for. Waking costs nothing where nobody sleeps.
class Sleepers {
 public:
  template <typename Done>
  void sleep_until(const Done& done) {
    std::unique_lock<std::mutex> lock(mutex_);
    count_.fetch_add(1);
    condition_.wait(lock, done);
    count_.fetch_sub(1);
  }
  // After what they wait for has become true, by a sequentially consistent store.
  void wake() {
    if (count_.load() == 0) return;
    {
      std::lock_guard<std::mutex> lock(mutex_);
    }
    condition_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable condition_;
  std::atomic<int> count_{0};
};

// The tasks of a thread that nobody has taken: one word, of the round, the next task and the end. A thread
// that comes late finds another round in it and leaves it alone.
struct alignas(64) Share {
  std::atomic<uint64_t> word{0};

  static uint64_t pack(uint64_t round, uint64_t next, uint64_t end) {
    return (round & 0xffffff) << 40 | next << 20 | end;
  }
  // The next task, -1: there is none.
  int64_t take(uint64_t round) {
    uint64_t found = word.load(std::memory_order_acquire);
    for (;;) {
      const uint64_t next = found >> 20 & 0xfffff, end = found & 0xfffff;
      if (found >> 40 != (round & 0xffffff) || next >= end) return -1;
      if (word.compare_exchange_weak(found, found + (1 << 20), std::memory_order_acq_rel)) return next;
    }
  }
};

class Team {
 public:
  explicit Team(int64_t threads) : shares_(threads) {
    try {
      for (int64_t i = 1; i < threads; ++i) helpers_.emplace_back([this, i] { help(i); });
    } catch (const std::system_error&) {  // no more threads are to be had: the others do their shares
    }
  }
  ~Team() {
    ends_.store(true);
    round_.fetch_add(1);
    called_.wake();
    for (std::thread& helper : helpers_) helper.join();
  }
  int64_t threads() const { return static_cast<int64_t>(shares_.size()); }

  void run(int64_t tasks, Parallel::Body body, const void* state) {
    if (tasks == 1 || shares_.size() == 1 || Clock::now() < alone_until_) {
      for (int64_t task = 0; task < tasks; ++task) body(state, task);
      return;
    }
    for (int64_t first = 0; first < tasks; first += kMaxTasks)
      round(first, std::min(kMaxTasks, tasks - first), body, state);
  }

 private:
  void round(int64_t first, int64_t tasks, Parallel::Body body, const void* state) {
    const uint64_t number = round_.load(std::memory_order_relaxed) + 1;
    const int64_t count = threads();
    first_ = first;
    body_ = body;
    state_ = state;
    open_.store(tasks, std::memory_order_relaxed);
    for (int64_t i = 0; i < count; ++i)
      shares_[i].word.store(Share::pack(number, tasks * i / count, tasks * (i + 1) / count),
                            std::memory_order_release);
    round_.store(number);
    called_.wake();
    work(0, number);
    const auto done = [this] { return open_.load() == 0; };
    if (done()) return;
    const auto begin = Clock::now();
    if (!spin(done)) finished_.sleep_until(done);
    if (const auto now = Clock::now(); now - begin > kLate) alone_until_ = now + kAlone;
  }

  // All tasks of the round, those of share `own` first.
  void work(int64_t own, uint64_t number) {
    const int64_t count = threads();
    for (int64_t i = 0; i < count; ++i) {
      Share& share = shares_[(own + i) % count];
      // Who holds a task keeps the round open, so that what it consists of stays as it is.
      for (int64_t task; (task = share.take(number)) >= 0;) {
        body_(state_, first_ + task);
        if (open_.fetch_sub(1) == 1) finished_.wake();
      }
    }
  }

  void help(int64_t own) {
    uint64_t seen = 0;
    for (;;) {
      const auto called = [&] { return round_.load() != seen; };
      if (!spin(called)) called_.sleep_until(called);
      seen = round_.load();
      if (ends_.load()) return;
      work(own, seen);
    }
  }

  std::vector<Share> shares_;
  std::vector<std::thread> helpers_;
  alignas(64) std::atomic<uint64_t> round_{0};
  alignas(64) std::atomic<int64_t> open_{0};  // tasks that are not done
  std::atomic<bool> ends_{false};
  int64_t first_ = 0;
  Parallel::Body body_ = nullptr;
  const void* state_ = nullptr;
  Clock::time_point alone_until_{};
  Sleepers called_, finished_;
};

// The quota of the process's group in processors, rounded up; 0: none.
int64_t quota() {
#if defined(__linux__)
  long long limit = 0, period = 0;
  if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    const int found = std::fscanf(file, "%lld %lld", &limit, &period);  // "max 100000" without a limit
    std::fclose(file);
    if (found == 2 && limit > 0 && period > 0) return static_cast<int64_t>((limit + period - 1) / period);
  }
#endif
  return 0;
}

int64_t processors() {
  int64_t count = std::max(1u, std::thread::hardware_concurrency());
#if defined(__linux__)
  // Large enough for any machine; a system with more processors than fit refuses, and all of them count.
  constexpr int kMost = 8192;
  cpu_set_t* set = CPU_ALLOC(kMost);
  if (set && sched_getaffinity(0, CPU_ALLOC_SIZE(kMost), set) == 0)
    count = std::max(1, CPU_COUNT_S(CPU_ALLOC_SIZE(kMost), set));
  if (set) CPU_FREE(set);
  if (const int64_t limit = quota()) count = std::min(count, limit);
#endif
  return count;
}

// The one team of the process, and who uses it.
struct Teams {
  std::mutex busy;
  std::unique_ptr<Team> team;
};

Teams* teams = nullptr;
std::once_flag made;

#if !defined(_WIN32)
// A forked child has none of its parent's threads: it begins with a team of its own, and forgets the
// parent's, which must not be destroyed here. Nor is its mutex, which another thread of the parent may have
// held.
void forget() { teams = new Teams; }
#endif

Teams& the_teams() {
  std::call_once(made, [] {
    teams = new Teams;  // never destroyed: helpers may outlive what main() returns from
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, forget);
#endif
  });
  return *teams;
}

thread_local int64_t wanted = 1;

void run_on_team(int64_t tasks, Parallel::Body body, const void* state) {
  Teams& all = the_teams();
  std::unique_lock<std::mutex> use(all.busy, std::try_to_lock);
  if (!use) {
    for (int64_t task = 0; task < tasks; ++task) body(state, task);
    return;
  }
  if (!all.team || all.team->threads() != wanted) {
    all.team.reset();
    all.team = std::make_unique<Team>(wanted);
  }
  all.team->run(tasks, body, state);
}

}  // namespace

int64_t team_threads(int64_t threads) {
  // Asked again once a second: it takes some microseconds, and may change.
  thread_local int64_t known = 0;
  thread_local Clock::time_point asked{};
  if (threads > 1 && (known == 0 || Clock::now() - asked > std::chrono::seconds(1))) {
    known = processors();
    asked = Clock::now();
  }
  return threads > 1 ? std::min(threads, known) : 1;
}

Parallel team(int64_t threads) {
  wanted = team_threads(threads);
  return {run_on_team, wanted};
}

}  // namespace cerberus
