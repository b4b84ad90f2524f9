// The thread pool: every task once and in order, workers that do work at the same time, callers
// that do not wait for one another, and life after a fork. No instruction set is involved.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <thread>
#include <vector>

#include "common.h"
#include "threads.h"

using fastfar::parallel;
using test::check;

namespace {

// Calls f(task, worker) for every task.
template <class F>
void run(int32_t threads, int64_t count, F f) {
  parallel(
      threads, count,
      [](void* context, int64_t task, int32_t worker) {
        (*static_cast<F*>(context))(task, worker);
      },
      &f);
}

// A barrier of `threads` tasks: only workers of which each has one can pass. False after 20 s.
struct Meeting {
  explicit Meeting(int32_t expected) : expected(expected) {}
  bool wait() {
    ++arrived;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (arrived.load() < expected) {
      if (std::chrono::steady_clock::now() > end) return false;
      std::this_thread::yield();
    }
    return true;
  }
  int32_t expected;
  std::atomic<int32_t> arrived{0};
};

// Whether `threads` workers, with numbers of their own, are at work at the same time.
bool together(int32_t threads) {
  Meeting meeting(threads);
  std::vector<int> met(static_cast<size_t>(threads), 0);
  run(threads, threads, [&](int64_t, int32_t worker) {
    if (worker >= 0 && worker < threads) met[static_cast<size_t>(worker)] += meeting.wait() ? 1 : 0;
  });
  bool all = true;
  for (const int times : met) all = all && times == 1;
  return all;
}

void every_task_once_and_in_order() {
  for (const int32_t threads : {-1, 0, 1, 2, 3, 4, 7}) {
    for (const int64_t count : {0, 1, 2, 3, 16, 1000}) {
      const int32_t workers = threads > 1 ? threads : 1;
      std::vector<int> runs(static_cast<size_t>(count), 0);  // plain: the return must publish them
      std::vector<int64_t> last(static_cast<size_t>(workers), -1);
      std::atomic<int> wrong{0};
      run(threads, count, [&](int64_t task, int32_t worker) {
        if (worker < 0 || worker >= workers || task < 0 || task >= count) {
          ++wrong;
          return;
        }
        ++runs[static_cast<size_t>(task)];
        if (last[static_cast<size_t>(worker)] >= task) ++wrong;
        last[static_cast<size_t>(worker)] = task;
      });
      for (const int times : runs) wrong += times == 1 ? 0 : 1;
      check(wrong == 0, "%d threads, %lld tasks: %d wrong", threads, static_cast<long long>(count),
            wrong.load());
    }
  }
}

void short_calls_in_a_row() {
  int64_t total = 0;
  for (int call = 0; call < 3000; ++call) {
    int64_t sums[4] = {};
    run(2 + call % 3, 5, [&](int64_t task, int32_t worker) { sums[worker] += task; });
    total += sums[0] + sums[1] + sums[2] + sums[3];
  }
  check(total == 30000, "3000 calls gave %lld", static_cast<long long>(total));
}

void after_a_pause() {
  for (int i = 0; i < 5; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // the helpers sleep now
    check(together(3), "sleeping workers did not wake");
  }
}

// The caller must not wait for a pool that another thread uses.
void callers_at_once() {
  Meeting inside(2), leave(2);
  std::atomic<int> wrong{0};
  std::thread first([&] {
    run(2, 2, [&](int64_t task, int32_t) {
      if (task != 0) return;
      if (!inside.wait() || !leave.wait()) ++wrong;
    });
  });
  check(inside.wait(), "the first caller did not start");
  int done = 0;
  run(4, 10, [&](int64_t, int32_t worker) { done += worker == 0 ? 1 : 100; });
  check(done == 10, "the second caller did not work alone: %d", done);
  check(leave.wait(), "the first caller was not where it should be");
  first.join();

  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&wrong, caller] {
      for (int call = 0; call < 300; ++call) {
        std::vector<int64_t> squares(64, -1);
        run(1 + (caller + call) % 4, 64,
            [&](int64_t task, int32_t) { squares[static_cast<size_t>(task)] = task * task; });
        for (int64_t i = 0; i < 64; ++i) wrong += squares[static_cast<size_t>(i)] == i * i ? 0 : 1;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  check(wrong == 0, "%d wrong results of callers at once", wrong.load());
}

// Workers round as their caller does, so that a result does not depend on who computed it.
void rounding_of_the_caller() {
  std::fesetround(FE_DOWNWARD);
  Meeting meeting(3);
  float thirds[3] = {};
  run(3, 3, [&](int64_t task, int32_t) {
    meeting.wait();
    volatile float one = 1.0F, three = 3.0F;
    thirds[task] = one / three;
  });
  std::fesetround(FE_TONEAREST);
  check(thirds[0] == thirds[1] && thirds[1] == thirds[2], "workers round differently");
  check(thirds[0] < 1.0F / 3.0F, "the caller's rounding was not used");  // the nearest is above
}

#if !defined(__SANITIZE_THREAD__)  // which does not know threads after a fork

// Exit status of a child that runs `body`, or -1 if it did not end within 20 s.
template <class F>
int status_of_child(const F& body) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) body();
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  for (;;) {
    int status = 0;
    if (waitpid(child, &status, WNOHANG) == child) {
      return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
    }
    if (std::chrono::steady_clock::now() > end) return -1;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void life_after_fork() {
  check(together(3), "before the fork");
  int status = status_of_child([] { _exit(together(3) && together(4) ? 0 : 1); });
  check(status == 0, "child of an idle pool: %d", status);
  check(together(4), "the parent after a fork");
  status = status_of_child([] { std::exit(together(4) ? 0 : 1); });
  check(status == 0, "child that leaves through exit: %d", status);
  status = status_of_child([] { std::exit(0); });
  check(status == 0, "child that does not use the pool: %d", status);

  // Another thread is at work at the moment of the fork.
  Meeting inside(2), leave(2);
  std::thread busy([&] {
    run(3, 3, [&](int64_t task, int32_t) {
      if (task == 0) inside.wait();
      if (task == 0) leave.wait();
    });
  });
  inside.wait();
  status = status_of_child([] { _exit(together(3) ? 0 : 1); });
  check(status == 0, "child of a pool at work: %d", status);
  leave.wait();
  busy.join();
  check(together(2), "the pool after a fork at work");

  // A program that ends while another thread is at work must end, not wait for it.
  status = status_of_child([] {
    auto* inside = new Meeting(2);
    std::thread([inside] {
      run(2, 2, [inside](int64_t task, int32_t) {
        if (task == 0) inside->wait();
        std::this_thread::sleep_for(std::chrono::seconds(60));
      });
    }).detach();
    inside->wait();
    std::exit(3);
  });
  check(status == 3, "exit while a thread is at work: %d", status);
}

#else
void life_after_fork() {}
#endif

}  // namespace

int main() {
  test::g_isa = "threads";
  every_task_once_and_in_order();
  short_calls_in_a_row();
  for (const int32_t threads : {2, 3, 4, 8}) {
    check(together(threads), "%d workers were not at work together", threads);
  }
  after_a_pause();
  callers_at_once();
  rounding_of_the_caller();
  life_after_fork();
  return test::finish();
}
