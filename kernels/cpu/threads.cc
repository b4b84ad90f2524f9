// A caller hands its tasks to helper threads through one slot per helper, works too, takes back the
// slots that nobody has begun, and waits for the others. So a helper that is slow to wake delays
// nobody: the caller has done its tasks by then.
//
// A helper waits for work by spinning for a moment, because the next call often follows at once,
// and then sleeps. It owns no lock while it works, and only its own while it looks for work.
#include "threads.h"

#include <pthread.h>
#include <signal.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

namespace fastfar {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int32_t kMaxHelpers = 255;
// Short: PyTorch's threads want the same cores.
constexpr std::chrono::microseconds kSpin{40};

// The work of the one caller that owns the pool.
struct Job {
  Task function;
  void* context;
  int64_t count;
  bool spin;           // may its threads spin: is there a core for each
  std::fenv_t floats;  // rounding and flushing of the caller, so that every worker computes alike
  alignas(64) std::atomic<int64_t> next;  // the first task that nobody has taken
};
Job g_job;

// Takes tasks until there are none left.
void work(int32_t worker) {
  const Task function = g_job.function;
  void* context = g_job.context;
  const int64_t count = g_job.count;
  for (;;) {
    const int64_t task = g_job.next.fetch_add(1, std::memory_order_relaxed);
    if (task >= count) return;
    function(context, task, worker);
  }
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

enum State : int32_t { kIdle, kOffered, kWorking, kQuit };

class alignas(64) Helper {
 public:
  explicit Helper(int32_t worker) : worker_(worker) {}

  // False where the system grants no thread. It blocks all signals: they are the program's.
  bool start() {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int failed = pthread_create(&thread_, nullptr, &Helper::run, this);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return failed == 0;
  }

  void offer() { set(kOffered); }

  // Returns when the helper is idle and all that it wrote can be seen.
  void finish() {
    State offered = kOffered;
    if (state_.compare_exchange_strong(offered, kIdle, std::memory_order_acquire)) return;
    wait_while(kWorking, g_job.spin);
  }

  void quit() {
    set(kQuit);
    pthread_join(thread_, nullptr);
  }

 private:
  static void* run(void* self) {
    static_cast<Helper*>(self)->loop();
    return nullptr;
  }

  void loop() {
    bool spin = false;
    for (;;) {
      wait_while(kIdle, spin);
      State state = kOffered;
      if (state_.compare_exchange_strong(state, kWorking, std::memory_order_acquire)) {
        spin = g_job.spin;
        std::fesetenv(&g_job.floats);
        work(worker_);
        set(kIdle);
      } else if (state == kQuit) {
        return;
      }  // else taken back
    }
  }

  void set(State state) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      state_.store(state, std::memory_order_release);
    }
    // At most one waits: the helper while it is idle, the caller while it is not.
    changed_.notify_one();
  }

  void wait_while(State state, bool spin) {
    if (spin) {
      const Clock::time_point end = Clock::now() + kSpin;
      do {
        for (int i = 0; i < 16; ++i) {
          if (state_.load(std::memory_order_acquire) != state) return;
          pause();
        }
      } while (Clock::now() < end);
    }
    std::unique_lock<std::mutex> lock(mutex_);
    while (state_.load(std::memory_order_acquire) == state) changed_.wait(lock);
  }

  std::atomic<State> state_{kIdle};
  std::mutex mutex_;
  std::condition_variable changed_;
  pthread_t thread_;
  const int32_t worker_;
};

// What follows, like g_job, belongs to the caller that has set g_busy.
std::atomic<bool> g_busy{false};
Helper* g_helpers[kMaxHelpers];
int32_t g_started = 0;
int32_t g_cpus = 1;

// Cores that this process may use.
int32_t usable_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return static_cast<int32_t>(CPU_COUNT(&set));
#endif
  return static_cast<int32_t>(std::thread::hardware_concurrency());
}

// Starts what is missing; returns how many of the `wanted` there are.
int32_t start_helpers(int32_t wanted) {
  if (g_started < wanted) g_cpus = usable_cpus();
  while (g_started < wanted) {
    Helper* helper = new (std::nothrow) Helper(g_started + 1);
    if (helper == nullptr) break;
    if (!helper->start()) {
      delete helper;
      break;
    }
    g_helpers[g_started++] = helper;
  }
  return wanted < g_started ? wanted : g_started;
}

// In the child of a fork, where the helpers do not exist. Their records stay behind: a lock in them
// may be held for ever. No other thread is here, so that nothing can be in use.
void forget_helpers() {
  g_started = 0;
  g_busy.store(false, std::memory_order_relaxed);
}
[[maybe_unused]] const int g_registered = pthread_atfork(nullptr, nullptr, &forget_helpers);

// At exit, and when the library is unloaded.
struct Ending {
  ~Ending() {
    // Where a thread is at work, let the process end around it. Else nobody uses the pool again:
    // g_busy stays set.
    if (g_busy.exchange(true, std::memory_order_acquire)) return;
    for (int32_t i = 0; i < g_started; ++i) {
      g_helpers[i]->quit();
      delete g_helpers[i];
    }
    g_started = 0;
  }
};
Ending g_ending;

}  // namespace

void parallel(int32_t threads, int64_t count, Task function, void* context) {
  if (threads <= 1 || count <= 1 || g_busy.exchange(true, std::memory_order_acquire)) {
    for (int64_t task = 0; task < count; ++task) function(context, task, 0);
    return;
  }
  const int64_t most = count - 1 < kMaxHelpers ? count - 1 : kMaxHelpers;
  const int32_t wanted = threads - 1 < most ? threads - 1 : static_cast<int32_t>(most);
  const int32_t helpers = start_helpers(wanted);
  g_job.function = function;
  g_job.context = context;
  g_job.count = count;
  g_job.spin = helpers < g_cpus;
  std::fegetenv(&g_job.floats);
  g_job.next.store(0, std::memory_order_relaxed);
  for (int32_t i = 0; i < helpers; ++i) g_helpers[i]->offer();
  work(0);
  for (int32_t i = 0; i < helpers; ++i) g_helpers[i]->finish();
  g_busy.store(false, std::memory_order_release);
}

}  // namespace fastfar
