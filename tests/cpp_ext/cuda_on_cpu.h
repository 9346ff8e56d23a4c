// Just enough of CUDA to run a kernel on the CPU: the threads of a block are threads, blocks run one after the other.
// For checking the arithmetic of kernels on machines without a GPU; says nothing about what a GPU does.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cmath>
#include <thread>
#include <vector>

struct Dim3 {
  unsigned x, y, z;
};
static thread_local Dim3 threadIdx, blockIdx;
static Dim3 blockDim, gridDim;
static pthread_barrier_t block_barrier;

#define __global__
#define __device__
#define __shared__ static
#define __syncthreads() pthread_barrier_wait(&block_barrier)

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

// Only its presence counts for compilation: float16 output is checked on a GPU.
inline unsigned short half_from_float(float) { return 0; }

template <class Kernel>
void launch(Dim3 grid, Dim3 block, Kernel kernel) {
  blockDim = block;
  gridDim = grid;
  const unsigned num_threads = block.x * block.y * block.z;
  pthread_barrier_init(&block_barrier, nullptr, num_threads);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < num_threads; ++t)
    threads.emplace_back([=] {
      threadIdx = {t % block.x, t / block.x % block.y, t / block.x / block.y};
      for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
          for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = {x, y, z};
            kernel();
            pthread_barrier_wait(&block_barrier);
          }
    });
  for (std::thread& thread : threads) thread.join();
  pthread_barrier_destroy(&block_barrier);
}
