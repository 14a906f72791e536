#include "pool.h"

#include <chrono>

namespace flyray {
namespace {

// Fewer multiply-adds than this take less time than waking a thread, or than handing work to one that is awake.
constexpr int64_t kWorthWaking = 1 << 18, kWorthSharing = 1 << 16;
// How long a worker waits for the next job before it sleeps: longer than the gap between two operations that are
// called one by one, too short to count for an engine that has nothing to do.
constexpr std::chrono::microseconds kLinger{200};
// Pauses between two looks at the clock, each of which also lets another thread have the CPU: some microseconds.
constexpr int kPauses = 128;

// Of `Pool::state_`.
constexpr uint64_t kActive = 0x7FFF, kOpen = 0x8000;
inline uint64_t job_of(uint64_t state) { return state >> 16; }

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads) : parts_(static_cast<size_t>(threads < 1 ? 1 : threads)) {
  for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

Pool::~Pool() {
  stop_.store(true);
  wake();
  for (std::thread& worker : workers_) worker.join();
}

Pool::Awake::Awake(Pool& pool) : pool_(pool) {
  pool_.awake_.fetch_add(1);
  pool_.wake();
}

Pool::Awake::~Awake() { pool_.awake_.fetch_sub(1, std::memory_order_relaxed); }

void Pool::run(int64_t tasks, int64_t operations, Task task, void* context) {
  const int64_t worth = sleepers_.load(std::memory_order_relaxed) == 0 ? kWorthSharing : kWorthWaking;
  if (workers_.empty() || tasks < 2 || operations < worth || taken_.exchange(true, std::memory_order_acquire)) {
    for (int64_t i = 0; i < tasks; ++i) task(context, i, 0);
    return;
  }
  task_ = task;
  context_ = context;
  share(tasks);
  // No worker is active and none may begin, so nobody else changes the state. Sequentially consistent, as in `sleep`:
  // either a worker sees the job before it sleeps or its sleep is seen here.
  const uint64_t state = (job_of(state_.load(std::memory_order_relaxed)) + 1) << 16 | kOpen;
  state_.store(state);
  wake();
  drain(0);
  state_.fetch_and(~kOpen, std::memory_order_relaxed);  // from here on no worker can begin with this job
  for (int spins = 1; state_.load(std::memory_order_acquire) & kActive; ++spins) {
    if (spins % kPauses) pause_briefly();
    else std::this_thread::yield();
  }
  taken_.store(false, std::memory_order_release);
}

void Pool::share(int64_t tasks) {
  for (int thread = 0; thread < threads(); ++thread) {
    Part& part = parts_[static_cast<size_t>(thread)];
    part.next.store(first_task(tasks, thread), std::memory_order_relaxed);
    part.end = first_task(tasks, thread + 1);
  }
}

void Pool::drain(int thread) {
  const size_t threads = parts_.size();
  for (size_t i = 0; i < threads; ++i) {
    Part& part = parts_[(static_cast<size_t>(thread) + i) % threads];
    for (int64_t task; (task = part.next.fetch_add(1, std::memory_order_relaxed)) < part.end;) {
      task_(context_, task, thread);
    }
  }
}

// Whether the worker now takes part in a job other than the one it has seen.
bool Pool::begin(uint64_t& seen) {
  uint64_t state = state_.load(std::memory_order_acquire);
  while (state & kOpen && job_of(state) != seen) {
    if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) {
      seen = job_of(state);
      return true;
    }
  }
  return false;
}

void Pool::work(int thread) {
  uint64_t seen = 0;
  auto last = std::chrono::steady_clock::now();
  for (int pauses = 1; !stop_.load(std::memory_order_relaxed); ++pauses) {
    if (begin(seen)) {
      drain(thread);
      state_.fetch_sub(1, std::memory_order_release);
      last = std::chrono::steady_clock::now();
      pauses = 0;
    } else if (pauses % kPauses) {
      pause_briefly();
    } else if (std::chrono::steady_clock::now() - last < kLinger || awake_.load(std::memory_order_relaxed)) {
      std::this_thread::yield();
    } else {
      sleep(seen);
      last = std::chrono::steady_clock::now();
    }
  }
}

void Pool::sleep(uint64_t seen) {
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1);
  wake_.wait(lock, [&] {
    const uint64_t state = state_.load();
    return (state & kOpen && job_of(state) != seen) || awake_.load() || stop_.load();
  });
  sleepers_.fetch_sub(1);
}

void Pool::wake() {
  if (sleepers_.load() == 0) return;
  { std::lock_guard<std::mutex> lock(mutex_); }  // whoever is about to sleep does so before, or sees what has changed
  wake_.notify_all();
}

}  // namespace flyray
