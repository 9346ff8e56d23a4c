#include "fused_embedding.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>

#include "kernels/rays.h"
#include "micro_kernels.h"

namespace factorportrait {
namespace {

// A task is this many tokens of one slot. Their tile (76 x 96 floats at most in the usual case) stays in the L2 cache
// beside the weights.
constexpr int kTaskTokens = 96;

// Output beyond this size is written past the caches: nothing of it would still be there when the next stage reads it,
// and ordinary stores would first read every line.
constexpr std::size_t kStreamBytes = std::size_t{24} << 20;

// The frames of a group share their rays only if their rotations keep lengths to this precision, far below what a
// float32 output shows.
constexpr double kOrthonormalTolerance = 1e-6;

int round_up(int value, int step) { return (value + step - 1) / step * step; }

int usable_threads(int requested) {
  if (requested > 0) return requested;
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

struct FusedEmbedding::Job {
  int num_slots;
  LatentView latents;
  int latent_channels;          // 0 when the latents are dropped
  const AlignedFloats* weight;  // of the latents
  std::vector<SlotCamera> cameras;
  int max_rays;  // largest number of rays in any slot, 0 without cameras
  OutputView out;
  bool stream;
};

struct FusedEmbedding::Scratch {
  Scratch(std::size_t tile, std::size_t folded) : tile(tile), folded(folded) {}
  AlignedFloats tile;    // [row block][depth][rows]
  AlignedFloats folded;  // [panels][ray, cell, 3][columns] of `slot`
  int slot = -1;
};

FusedEmbedding::FusedEmbedding(const EmbeddingConfig& config, const float* weight, const float* bias, Isa isa)
    : config_(config), isa_(isa), num_threads_(usable_threads(config.num_threads)) {
  const auto positive = [](int value, const char* name) {
    if (value <= 0)
      throw std::invalid_argument(std::string(name) + ": expected a positive number, got " + std::to_string(value));
  };
  positive(config.dim, "dim");
  positive(config.num_channels, "num_channels");
  positive(config.patch_height, "patch_height");
  positive(config.patch_width, "patch_width");
  if (config.num_threads < 0)
    throw std::invalid_argument("num_threads: expected 0 (all) or more, got " + std::to_string(config.num_threads));
  if (!(config.stride > 0) || !std::isfinite(config.stride))
    throw std::invalid_argument("stride: expected a positive number of pixels");
  const std::pair<const char*, ChannelRange> ranges[] = {
      {"reference", config.reference}, {"camera", config.camera}, {"pose", config.pose}};
  for (const auto& [name, range] : ranges)
    if (range.start < 0 || range.count < 0 || range.start > config.num_channels - range.count)
      throw std::invalid_argument(std::string(name) + ": channels " + std::to_string(range.start) + " to " +
                                  std::to_string(range.start + range.count) + " are outside of the weight's " +
                                  std::to_string(config.num_channels));
  if (config.camera.count != 0 && config.camera.count != kRayChannels &&
      config.camera.count != kFramesPerGroup * kRayChannels)
    throw std::invalid_argument("camera: expected 0, 6 or 24 channels, got " + std::to_string(config.camera.count));
  token_rows_ = config.latent_height / config.patch_height;
  token_columns_ = config.latent_width / config.patch_width;
  if (config.latent_height < 1 || config.latent_width < 1 || token_rows_ < 1 || token_columns_ < 1)
    throw std::invalid_argument("latent_height, latent_width: expected at least one patch of " +
                                std::to_string(config.patch_height) + " x " + std::to_string(config.patch_width) +
                                ", got " + std::to_string(config.latent_height) + " x " +
                                std::to_string(config.latent_width));
  cells_ = config.patch_height * config.patch_width;
  const KernelFamily& kernels = kernel_family(isa_);
  panels_ = round_up(config.dim, kernels.columns) / kernels.columns;

  bias_ = AlignedFloats(static_cast<std::size_t>(panels_) * kernels.columns);
  std::memcpy(bias_.data(), bias, static_cast<std::size_t>(config.dim) * sizeof(float));
  const auto order = [this](const ChannelRange& range, bool cell_first) {
    std::vector<int> rows(static_cast<std::size_t>(range.count) * cells_);
    for (int channel = 0; channel < range.count; ++channel)
      for (int cell = 0; cell < cells_; ++cell)
        rows[cell_first ? cell * range.count + channel : channel * cells_ + cell] =
            (range.start + channel) * cells_ + cell;
    return rows;
  };
  pack(weight, config.reference, order(config.reference, false), &reference_weight_);
  pack(weight, config.pose, order(config.pose, false), &pose_weight_);
  pack(weight, config.camera, order(config.camera, true), &camera_weight_);
}

void FusedEmbedding::pack(const float* weight, const ChannelRange& range, std::vector<int> order,
                          AlignedFloats* packed) const {
  const int columns = kernel_family(isa_).columns;
  const std::size_t depth = static_cast<std::size_t>(range.count) * cells_;
  const std::size_t row_length = static_cast<std::size_t>(config_.num_channels) * cells_;
  *packed = AlignedFloats(depth * panels_ * columns);  // zeroed: the columns past `dim` are computed and never written
  float* target = packed->data();
  for (int panel = 0; panel < panels_; ++panel)
    for (std::size_t k = 0; k < depth; ++k, target += columns)
      for (int column = 0; column < std::min(columns, config_.dim - panel * columns); ++column)
        target[column] = weight[static_cast<std::size_t>(panel * columns + column) * row_length + order[k]];
}

std::vector<FusedEmbedding::SlotCamera> FusedEmbedding::prepare_cameras(int num_slots, const CameraView& camera) const {
  const bool last_only = config_.camera.count == kRayChannels;
  const int frames = camera.num_frames, whole = kFramesPerGroup * num_slots;
  if (frames != whole && frames != whole - 3 && !(last_only && frames == num_slots))
    throw std::invalid_argument("c2w: expected " + std::to_string(whole) + " frames for " + std::to_string(num_slots) +
                                " slots (or " + std::to_string(whole - 3) + " at the start of a clip" +
                                (last_only ? ", or " + std::to_string(num_slots) : "") + "), got " +
                                std::to_string(frames));
  if (camera.num_intrinsics != frames && camera.num_intrinsics != 1)
    throw std::invalid_argument("K: expected " + std::to_string(frames) +
                                " matrices as for c2w, or one for all frames, got " +
                                std::to_string(camera.num_intrinsics));

  struct Frame {
    double rotation[9], origin[3], inverse[9];
    bool orthonormal;
  };
  std::vector<Frame> parsed(frames);
  for (int f = 0; f < frames; ++f) {
    Frame& frame = parsed[f];
    const double* intrinsics = camera.intrinsics + (camera.num_intrinsics == 1 ? 0 : f) * 9;
    const std::string name = "[" + std::to_string(f) + "]";
    if (!invert3(intrinsics, frame.inverse))
      throw std::invalid_argument("K" + name +
                                  ": expected an invertible matrix of finite numbers; no ray goes through a pixel");
    const double* matrix = camera.c2w + f * 16;
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) frame.rotation[3 * i + j] = matrix[4 * i + j];
      frame.origin[i] = matrix[4 * i + 3];
    }
    double unused[9];
    if (!invert3(frame.rotation, unused) || !std::isfinite(frame.origin[0] + frame.origin[1] + frame.origin[2]))
      throw std::invalid_argument("c2w" + name + ": expected a rotation and a translation of finite numbers");
    if (std::abs(matrix[12]) + std::abs(matrix[13]) + std::abs(matrix[14]) + std::abs(matrix[15] - 1.0) > 1e-9)
      throw std::invalid_argument("c2w" + name + ": expected a last row of 0 0 0 1; is it transposed?");
    frame.orthonormal = is_orthonormal(frame.rotation, kOrthonormalTolerance);
  }

  constexpr double identity[9] = {1, 0, 0, 0, 1, 0, 0, 0, 1};
  const int per_slot = last_only ? 1 : kFramesPerGroup;
  std::vector<SlotCamera> slots(num_slots);
  for (int s = 0; s < num_slots; ++s) {
    SlotCamera& slot = slots[s];
    const Frame* group[kFramesPerGroup];
    for (int j = 0; j < per_slot; ++j)
      group[j] = &parsed[group_frame(frames, num_slots, s, last_only ? kFramesPerGroup - 1 : j)];
    bool shared = true;
    for (int j = 0; j < per_slot; ++j)
      shared = shared && group[j]->orthonormal &&
               std::memcmp(group[j]->inverse, group[0]->inverse, sizeof group[0]->inverse) == 0;
    slot.num_rays = shared ? 1 : per_slot;
    for (int j = 0; j < per_slot; ++j) {
      const Frame& frame = *group[j];
      double fold[18];
      fold_matrix(shared ? frame.rotation : identity, frame.origin, fold);
      std::memcpy(slot.folds[kRayChannels * j], fold, sizeof fold);
      if (shared) {
        std::memcpy(slot.maps[0], frame.inverse, sizeof frame.inverse);
      } else {
        for (int r = 0; r < 3; ++r)
          for (int c = 0; c < 3; ++c) {
            slot.maps[j][3 * r + c] = 0;
            for (int i = 0; i < 3; ++i) slot.maps[j][3 * r + c] += frame.rotation[3 * r + i] * frame.inverse[3 * i + c];
          }
      }
    }
  }
  return slots;
}

void FusedEmbedding::embed_reference(const LatentView& latents, const OutputView& out) const {
  Job job{};
  job.num_slots = 1;
  job.latents = latents;
  job.latent_channels = latents.data ? config_.reference.count : 0;
  job.weight = &reference_weight_;
  job.out = out;
  run(job);
}

void FusedEmbedding::embed_chunk(int num_slots, const CameraView& camera, const LatentView& pose,
                                 const OutputView& out) const {
  if (num_slots < 1) throw std::invalid_argument("num_slots: expected at least 1, got " + std::to_string(num_slots));
  Job job{};
  job.num_slots = num_slots;
  job.latents = pose;
  job.latent_channels = pose.data ? config_.pose.count : 0;
  job.weight = &pose_weight_;
  if (camera.intrinsics && config_.camera.count) job.cameras = prepare_cameras(num_slots, camera);
  for (const SlotCamera& slot : job.cameras) job.max_rays = std::max(job.max_rays, slot.num_rays);
  job.out = out;
  run(job);
}

void FusedEmbedding::run(const Job& prototype) const {
  Job job = prototype;
  const KernelFamily& kernels = kernel_family(isa_);
  const std::size_t elements = static_cast<std::size_t>(job.num_slots) * tokens_per_frame() * config_.dim;
  const std::size_t row_bytes = static_cast<std::size_t>(config_.dim) * sizeof(float);
  job.stream = !job.out.half && kernels.stream[1] && elements * sizeof(float) >= kStreamBytes && row_bytes % 64 == 0 &&
               reinterpret_cast<std::uintptr_t>(job.out.data) % 64 == 0;

  const int tasks_per_slot = round_up(tokens_per_frame(), kTaskTokens) / kTaskTokens;
  const int num_tasks = tasks_per_slot * job.num_slots;
  const int num_threads = std::min(num_threads_, num_tasks);
  const int camera_depth = 3 * cells_ * job.max_rays;
  const std::size_t depth = static_cast<std::size_t>(job.latent_channels) * cells_ + camera_depth;

  // A thread starts in a region of its own, so that it folds the camera weights of few slots, and then helps out in the
  // others.
  std::vector<std::atomic<int>> next(num_threads);
  std::vector<Scratch> scratch;
  scratch.reserve(num_threads);
  const auto region = [&](int i) { return static_cast<int>(static_cast<std::int64_t>(num_tasks) * i / num_threads); };
  for (int i = 0; i < num_threads; ++i) {
    next[i] = region(i);
    scratch.emplace_back(depth * round_up(kTaskTokens, kernels.rows),
                         static_cast<std::size_t>(panels_) * kernels.columns * camera_depth);
  }
  const auto body = [&](int thread) {
    for (int i = 0; i < num_threads; ++i) {
      const int owner = (thread + i) % num_threads, end = region(owner + 1);
      for (int task = next[owner]++; task < end; task = next[owner]++) work(job, task, &scratch[thread]);
    }
    kernels.fence();
  };

  // Threads live for one call: starting one costs some 20 microseconds against milliseconds of work, and nothing is
  // left that would spin beside the other stages, or be missing after a fork.
  std::vector<std::thread> threads;
  threads.reserve(num_threads);
  for (int i = 1; i < num_threads; ++i) {
    try {
      threads.emplace_back(body, i);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: those that run take the work over
    }
  }
  body(0);
  for (std::thread& thread : threads) thread.join();
}

// tile: [row block][latent channel, cell; ray, cell, 3][rows]
void FusedEmbedding::fill_tile(const Job& job, int slot, int first_token, int num_tokens, float* tile) const {
  const int rows = kernel_family(isa_).rows;
  const float* latents = job.latent_channels ? job.latents.data + slot * job.latents.slot_stride : nullptr;
  const int num_rays = job.cameras.empty() ? 0 : job.cameras[slot].num_rays;
  const int latent_depth = job.latent_channels * cells_;
  const int depth = latent_depth + 3 * cells_ * num_rays;
  for (int block = 0; block < num_tokens; block += rows, tile += static_cast<std::ptrdiff_t>(depth) * rows) {
    const int count = std::min(rows, num_tokens - block);
    for (int row = 0; row < count; ++row) {
      const int token = first_token + block + row;
      const int top = token / token_columns_ * config_.patch_height,
                left = token % token_columns_ * config_.patch_width;
      float* target = tile + row;
      for (int channel = 0; channel < job.latent_channels; ++channel) {
        const float* corner = latents + channel * job.latents.channel_stride +
                              static_cast<std::ptrdiff_t>(top) * config_.latent_width + left;
        for (int y = 0; y < config_.patch_height; ++y, corner += config_.latent_width)
          for (int x = 0; x < config_.patch_width; ++x, target += rows) *target = corner[x];
      }
      for (int ray = 0; ray < num_rays; ++ray) {
        const double* map = job.cameras[slot].maps[ray];
        for (int y = 0; y < config_.patch_height; ++y)
          for (int x = 0; x < config_.patch_width; ++x) {
            double direction[3];
            unit_direction(map, cell_centre(left + x, config_.stride), cell_centre(top + y, config_.stride), direction);
            for (int j = 0; j < 3; ++j, target += rows) *target = static_cast<float>(direction[j]);
          }
      }
    }
  }
}

void FusedEmbedding::work(const Job& job, int task, Scratch* scratch) const {
  const KernelFamily& kernels = kernel_family(isa_);
  const int tasks_per_slot = round_up(tokens_per_frame(), kTaskTokens) / kTaskTokens;
  const int slot = task / tasks_per_slot;
  const int first_token = task % tasks_per_slot * kTaskTokens;
  const int num_tokens = std::min(kTaskTokens, tokens_per_frame() - first_token);
  const int num_rays = job.cameras.empty() ? 0 : job.cameras[slot].num_rays;
  const int latent_depth = job.latent_channels * cells_, camera_depth = 3 * cells_ * num_rays;
  const int channels = config_.camera.count;
  float* folded = scratch->folded.data();
  float* tile = scratch->tile.data();
  if (num_rays && scratch->slot != slot) {
    for (int panel = 0; panel < panels_; ++panel)
      kernels.fold(camera_weight_.data() + static_cast<std::ptrdiff_t>(panel) * cells_ * channels * kernels.columns,
                   job.cameras[slot].folds, cells_, channels, num_rays,
                   folded + static_cast<std::ptrdiff_t>(panel) * camera_depth * kernels.columns);
    scratch->slot = slot;
  }
  fill_tile(job, slot, first_token, num_tokens, tile);

  const std::size_t element = job.out.half ? 2 : 4;
  const std::ptrdiff_t first_row = static_cast<std::ptrdiff_t>(slot) * tokens_per_frame() + first_token;
  for (int panel = 0; panel < panels_; ++panel) {
    MicroArguments arguments{};
    arguments.first = job.weight->data() + static_cast<std::ptrdiff_t>(panel) * latent_depth * kernels.columns;
    arguments.second = folded + static_cast<std::ptrdiff_t>(panel) * camera_depth * kernels.columns;
    arguments.bias = bias_.data() + static_cast<std::ptrdiff_t>(panel) * kernels.columns;
    arguments.out_stride = config_.dim;
    arguments.first_depth = latent_depth;
    arguments.second_depth = camera_depth;
    arguments.num_columns = std::min(kernels.columns, config_.dim - panel * kernels.columns);
    const bool stream = job.stream && arguments.num_columns == kernels.columns;
    const MicroKernel* table = job.out.half ? kernels.half : stream ? kernels.stream : kernels.single;
    for (int block = 0; block < num_tokens; block += kernels.rows) {
      arguments.tile = tile + static_cast<std::ptrdiff_t>(block) * (latent_depth + camera_depth);
      arguments.out = static_cast<char*>(job.out.data) +
                      ((first_row + block) * config_.dim + static_cast<std::ptrdiff_t>(panel) * kernels.columns) *
                          static_cast<std::ptrdiff_t>(element);
      table[std::min(kernels.rows, num_tokens - block)](arguments);
    }
  }
}

}  // namespace factorportrait
