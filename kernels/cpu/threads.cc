#include "threads.h"

namespace fastfar {

void parallel(int32_t, int64_t count, Task function, void* context) {
  for (int64_t task = 0; task < count; ++task) function(context, task, 0);
}

}  // namespace fastfar
