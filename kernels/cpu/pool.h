// A small fork-join thread pool: a fixed number of threads, tasks claimed one by one from a shared counter.
//
// The caller works too, and it waits only for workers that have begun, so a worker that the system does not
// schedule never delays it. Which thread runs a task never changes a result: every output element is computed
// whole by one task.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace flyray {

using Task = void (*)(void* context, int64_t task, int thread);

class Pool {
 public:
  // threads: how many compute at once, the caller included; at least 1.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs tasks 0 .. tasks - 1 and returns when all are done. `operations` estimates the multiply-adds of all of
  // them; too few to repay waking the others run on the caller, and so does a call while another one is running.
  void run(int64_t tasks, int64_t operations, Task task, void* context);

 private:
  struct Job {
    Task task;
    void* context;
    int64_t tasks;
    std::atomic<int64_t> next{0};
  };

  void work(int thread);
  static void drain(Job& job, int thread);

  std::mutex callers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  Job* job_ = nullptr;  // guarded by mutex_
  bool stop_ = false;   // guarded by mutex_
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> active_{0};
  std::vector<std::thread> workers_;
};

}  // namespace flyray
