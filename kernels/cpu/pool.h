// A small fork-join thread pool: a fixed number of threads, each with its own part of the tasks, claimed one by one in
// their order. Who has none left claims the others'. So threads seldom meet at a counter, and in operations that follow
// one another the same rows stay in one thread's cache.
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

  int threads() const { return static_cast<int>(parts_.size()); }

  // Where a thread begins with so many tasks. It goes on with the next one.
  int64_t first_task(int64_t tasks, int64_t thread) const { return thread * tasks / threads(); }

  // Runs tasks 0 .. tasks - 1 and returns when all are done. `operations` estimates the multiply-adds of all of
  // them; too few to repay the others' help run on the caller, and so does a call while another one is running.
  void run(int64_t tasks, int64_t operations, Task task, void* context);

  // While one lives no worker sleeps: more calls of `run` are about to come.
  class Awake {
   public:
    explicit Awake(Pool& pool);
    ~Awake();
    Awake(const Awake&) = delete;
    Awake& operator=(const Awake&) = delete;

   private:
    Pool& pool_;
  };

 private:
  void work(int thread);
  void drain(int thread);
  void share(int64_t tasks);
  bool begin(uint64_t& seen);
  void sleep(uint64_t seen);
  void wake();

  // The one job. A worker may touch it only between adding itself to `state_` and taking itself off again.
  Task task_ = nullptr;
  void* context_ = nullptr;
  struct alignas(64) Part {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  std::vector<Part> parts_;  // by thread
  // The job's number, whether workers may still begin with it, and how many are at it.
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<bool> taken_{false};  // a caller is in `run`
  std::atomic<int> awake_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace flyray
