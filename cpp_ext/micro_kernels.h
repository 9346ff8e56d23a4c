// Register-blocked products of a few tokens and a panel of output columns, one family per instruction set.
#pragma once

#include <cstddef>

#include "fused_embedding.h"

namespace factorportrait {

// out[row][column] = bias[column] + sum over k of tile[k][row] * weights[k][column], the weights lying in two pieces.
struct MicroArguments {
  const float* tile;          // [first_depth + second_depth][rows of the kernel]
  const float* first;         // [first_depth][columns of the kernel], 64-byte aligned
  const float* second;        // [second_depth][columns of the kernel], 64-byte aligned
  const float* bias;          // [columns of the kernel]
  void* out;                  // element (0, 0)
  std::ptrdiff_t out_stride;  // elements from one row to the next
  int first_depth;
  int second_depth;
  int num_columns;  // columns to write, fewer than the kernel's in the last panel
};

using MicroKernel = void (*)(const MicroArguments&);
// folded[ray, cell, 3][columns] from weights[cell, channel][columns] of one panel
using FoldKernel = void (*)(const float* weights, const double (*folds)[3], int cells, int channels, int num_rays,
                            float* folded);

constexpr int kMaxRows = 8;

struct KernelFamily {
  int rows;
  int columns;
  MicroKernel single[kMaxRows + 1];  // by number of rows; float32 output
  MicroKernel
      stream[kMaxRows + 1];  // the same, past the caches: output 64-byte aligned, all columns. Null where there is none
  MicroKernel half[kMaxRows + 1];  // float16 output
  FoldKernel fold;
  void (*fence)();  // orders streaming stores before what follows
};

const KernelFamily& kernel_family(Isa isa);

}  // namespace factorportrait
