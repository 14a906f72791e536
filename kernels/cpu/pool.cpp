#include "pool.h"

namespace flyray {
namespace {

// Fewer multiply-adds than this take less time than waking a thread.
constexpr int64_t kWorthWaking = 1 << 18;
// Pauses before a worker sleeps: some 10 to 25 microseconds, the gap between two operations of one layer.
constexpr int kSpins = 500;

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads) {
  for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::run(int64_t tasks, int64_t operations, Task task, void* context) {
  const bool alone = workers_.empty() || tasks < 2 || operations < kWorthWaking || !callers_.try_lock();
  if (alone) {
    for (int64_t i = 0; i < tasks; ++i) task(context, i, 0);
    return;
  }
  std::lock_guard<std::mutex> caller(callers_, std::adopt_lock);
  Job job;
  job.task = task;
  job.context = context;
  job.tasks = tasks;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    job_ = &job;
    generation_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  drain(job, 0);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    job_ = nullptr;  // from here on no worker can begin with this job
  }
  for (int spins = 0; active_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < kSpins) pause_briefly();
    else std::this_thread::yield();
  }
}

void Pool::drain(Job& job, int thread) {
  for (;;) {
    const int64_t task = job.next.fetch_add(1, std::memory_order_relaxed);
    if (task >= job.tasks) return;
    job.task(job.context, task, thread);
  }
}

void Pool::work(int thread) {
  uint64_t seen = 0;
  for (;;) {
    for (int spins = 0; spins < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spins) pause_briefly();
    Job* job;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
      if (stop_) return;
      seen = generation_.load(std::memory_order_relaxed);
      job = job_;
      if (job != nullptr) active_.fetch_add(1, std::memory_order_relaxed);
    }
    if (job != nullptr) {
      drain(*job, thread);
      active_.fetch_sub(1, std::memory_order_release);
    }
  }
}

}  // namespace flyray
