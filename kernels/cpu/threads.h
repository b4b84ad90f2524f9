// The one thread pool of the library. Compiled with the compiler's baseline flags.
#ifndef FASTFAR_KERNELS_CPU_THREADS_H_
#define FASTFAR_KERNELS_CPU_THREADS_H_

#include <cstdint>

namespace fastfar {

// Called as function(context, task, worker), worker in 0..threads - 1.
using Task = void (*)(void* context, int64_t task, int32_t worker);

// Runs tasks 0..count - 1, each once, on at most `threads` threads of which the caller is one, and
// returns when all are done. Tasks are handed out in ascending order as threads become free. Where
// the pool is at another caller's work, the caller does its tasks alone. Not to be nested.
void parallel(int32_t threads, int64_t count, Task function, void* context);

}  // namespace fastfar

#endif  // FASTFAR_KERNELS_CPU_THREADS_H_
