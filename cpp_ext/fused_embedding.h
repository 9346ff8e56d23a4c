// Condition tokens straight from cameras and latents. No Python in here: the sanitised test program uses it as it is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace factorportrait {

enum class Isa { kPortable, kAvx2, kAvx512 };

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);
Isa best_isa();
Isa parse_isa(const std::string& name);  // "auto", "portable", "avx2", "avx512"; throws std::invalid_argument

// A range of the patch embedding's input channels.
struct ChannelRange {
  int start = 0;
  int count = 0;
};

struct EmbeddingConfig {
  int dim = 0;           // D, width of a token
  int num_channels = 0;  // C, all input channels of the patch embedding, the noise included
  int patch_height = 2;
  int patch_width = 2;
  ChannelRange reference;
  ChannelRange camera;  // count 0, 6 (last frame of a group) or 24 (four frames)
  ChannelRange pose;
  int latent_height = 0;
  int latent_width = 0;
  double stride = 8;    // pixels per latent cell
  int num_threads = 0;  // 0: one per CPU that the process may use
};

// One latent frame is [channels][latent_height][latent_width]; its rows are contiguous, channels and slots lie
// anywhere.
struct LatentView {
  const float* data = nullptr;  // nullptr: all zero (a dropped condition)
  std::ptrdiff_t channel_stride = 0;
  std::ptrdiff_t slot_stride = 0;
};

struct CameraView {
  const double* intrinsics = nullptr;  // [num_intrinsics][3][3]; nullptr: all zero (a dropped condition)
  int num_intrinsics = 0;              // num_frames, or 1 for all of them
  const double* c2w = nullptr;         // [num_frames][4][4]
  int num_frames = 0;                  // 4N, or 4N-3 at the start of a clip, or N when only the last frame counts
};

// Rows of `dim` elements, without gaps.
struct OutputView {
  void* data = nullptr;
  bool half = false;
};

class AlignedFloats {
 public:
  AlignedFloats() = default;
  AlignedFloats(AlignedFloats&&) = default;  // not copied: the aligned start would move within the copy
  AlignedFloats& operator=(AlignedFloats&&) = default;
  explicit AlignedFloats(std::size_t count) : storage_(count + kAlign / sizeof(float)) {}
  float* data() {
    const auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
    return storage_.data() + ((kAlign - address % kAlign) % kAlign) / sizeof(float);
  }
  const float* data() const { return const_cast<AlignedFloats*>(this)->data(); }

 private:
  static constexpr std::size_t kAlign = 64;
  std::vector<float> storage_;
};

class FusedEmbedding {
 public:
  // weight: [dim][num_channels][patch_height][patch_width]; bias: [dim]. Both are copied, in the layout of the kernels.
  FusedEmbedding(const EmbeddingConfig& config, const float* weight, const float* bias, Isa isa);

  // out: [T][dim].
  void embed_reference(const LatentView& latents, const OutputView& out) const;

  // out: [num_slots * T][dim]. Throws std::invalid_argument for cameras that have no ray.
  void embed_chunk(int num_slots, const CameraView& camera, const LatentView& pose, const OutputView& out) const;

  const EmbeddingConfig& config() const { return config_; }
  Isa isa() const { return isa_; }
  int tokens_per_frame() const { return token_rows_ * token_columns_; }
  int num_threads() const { return num_threads_; }

 private:
  // What the threads need to know of the cameras of one slot.
  struct SlotCamera {
    int num_rays;         // distinct rays through a cell: 1, or 4 when the frames of a group differ in their intrinsics
    double maps[4][9];    // pixel -> direction of each ray
    double folds[24][3];  // camera channel -> its share in the three weights of its ray
  };
  struct Job;
  struct Scratch;

  void pack(const float* weight, const ChannelRange& range, std::vector<int> order, AlignedFloats* packed) const;
  std::vector<SlotCamera> prepare_cameras(int num_slots, const CameraView& camera) const;
  void run(const Job& job) const;
  void work(const Job& job, int task, Scratch* scratch) const;
  void fill_tile(const Job& job, int slot, int first_token, int num_tokens, float* tile) const;

  EmbeddingConfig config_;
  Isa isa_;
  int num_threads_;
  int cells_;  // latent cells in a patch
  int token_rows_;
  int token_columns_;
  int panels_;                      // groups of columns that a kernel handles at once
  AlignedFloats bias_;              // [panels][columns]
  AlignedFloats reference_weight_;  // [panels][channel, cell][columns]
  AlignedFloats pose_weight_;       // [panels][channel, cell][columns]
  AlignedFloats camera_weight_;     // [panels][cell, channel][columns], not yet folded
};

}  // namespace factorportrait
