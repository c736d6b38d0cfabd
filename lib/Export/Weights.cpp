//===- Weights.cpp - packing weights into files ---------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Export/Weights.h"

#include "moe/Export/Output.h"
#include "moe/Support/Parallel.h"

#include "llvm/ADT/STLExtras.h"
#include "llvm/Support/MathExtras.h"

#include <condition_variable>
#include <cstring>
#include <mutex>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace moec {

//===----------------------------------------------------------------------===//
// Sizes
//===----------------------------------------------------------------------===//

static int32_t dtypeNumber(Format format) {
  return format == Format::F32 ? MOEC_DT_F32 : MOEC_DT_BF16;
}

/// How a weight lies in a packed file.
static int32_t layoutOf(const WeightSpec &weight) {
  return isVector(weight.role) ? MOEC_VECTOR32 : MOEC_PANEL32;
}

/// Bytes of one panel.
static uint64_t panelBytes(const WeightSpec &weight) {
  return moec_pack_expert_bytes(layoutOf(weight), dtypeNumber(weight.format), 1, 1, weight.cols);
}

/// Rows in a block, a multiple of a panel's rows. Small blocks stay in the second-level cache from
/// being read to being written. The rows of a transposed weight are strips of every line in the
/// file, so its blocks are as large as memory allows.
static int64_t rowsPerBlock(const WeightSpec &weight, const PackPlan &plan) {
  bool transposed =
      llvm::any_of(weight.sources, [](const WeightSource &s) { return s.transposed; });
  uint64_t bytes = transposed ? plan.transposedBytes : 1u << 20;
  int64_t lanes = moec_pack_panel_rows(static_cast<int32_t>(weight.parts));
  uint64_t panel = panelBytes(weight);
  int64_t panels = static_cast<int64_t>(std::max<uint64_t>(1, bytes / panel));
  return std::min<int64_t>(panels * lanes, llvm::alignTo(weight.rows, lanes));
}

static int64_t blocksOf(const WeightSpec &weight, const PackPlan &plan) {
  return weight.experts * llvm::divideCeil(weight.rows, rowsPerBlock(weight, plan));
}

/// The JSON head of a packed file, padded so that data begins at byte 4096 (or a later multiple).
static std::string packedHead(const LayerSpec &layer, const std::vector<PackedWeight> &weights,
                              uint64_t &dataBegin) {
  auto entry = [](llvm::StringRef dtype, uint64_t items, uint64_t begin, uint64_t end) {
    return ("{\"dtype\":\"" + dtype + "\",\"shape\":[" + llvm::Twine(items) +
            "],\"data_offsets\":[" + llvm::Twine(begin) + "," + llvm::Twine(end) + "]}")
        .str();
  };
  std::string json = "{\"__metadata__\":{\"format\":\"moec\",\"layout\":\"" + packedLayout.str() +
                     "\",\"name\":" + canonicalText(llvm::json::Value(layer.name)) +
                     "},\"moec.id\":" + entry("U8", 4096, 0, 4096);
  uint64_t offset = 4096;
  for (const PackedWeight &w : weights) {
    bool f32 = w.format == "f32";
    json += ",\"" + w.role +
            "\":" + entry(f32 ? "F32" : "BF16", w.bytes / (f32 ? 4 : 2), offset, offset + w.bytes);
    offset += w.bytes;
  }
  json += "}";
  dataBegin = llvm::alignTo(json.size() + 8, 4096);
  json.append(dataBegin - 8 - json.size(), ' ');
  uint64_t length = json.size();
  std::string head(8, '\0');
  for (int i = 0; i < 8; ++i)
    head[i] = static_cast<char>(length >> (8 * i));
  return head + json;
}

uint64_t packedFileBytes(const LayerSpec &layer) {
  std::vector<PackedWeight> weights = packedWeights(layer);
  uint64_t bytes = 0;
  (void)packedHead(layer, weights, bytes);
  bytes += 4096;
  for (const PackedWeight &w : weights)
    bytes += w.bytes;
  return bytes;
}

PackPlan::PackPlan(llvm::ArrayRef<LayerSpec> layers, unsigned threads)
    : transposedBytes(
          std::clamp<uint64_t>((64u << 20) / std::max(1u, threads), 1u << 20, 16u << 20)) {
  uint64_t blocks = 0, most = 0;
  for (const LayerSpec &layer : layers)
    for (const WeightSpec &weight : layer.weights) {
      blocks += blocksOf(weight, *this);
      uint64_t rows = rowsPerBlock(weight, *this);
      int64_t lanes = moec_pack_panel_rows(static_cast<int32_t>(weight.parts));
      uint64_t block = rows / lanes * panelBytes(weight) + 4096;
      // Rows as they are stored, of at most 4 bytes an element, and the same decoded.
      most = std::max(most, block + 2 * rows * weight.cols * sizeof(float));
    }
  workers = static_cast<unsigned>(std::clamp<uint64_t>(blocks, 1, std::max(1u, threads)));
  memory = most * workers;
}

//===----------------------------------------------------------------------===//
// Packing
//===----------------------------------------------------------------------===//

namespace {

/// One tensor to be packed, in blocks of `step` rows: expert after expert, row after row.
struct Tensor {
  const WeightSpec *weight;
  size_t layer;        ///< its number
  uint64_t firstBlock; ///< counted through all tensors of all layers
  uint64_t blocks;
  int64_t step, blocksPerExpert;
  uint64_t offset, bytes; ///< in the file; the bytes with padding
  /// A hash goes through a tensor from its beginning to its end: blocks wait for their turn.
  uint64_t turn = 0;
  XXH3_state_t hash;
};

/// The file of a layer: made with its first block, closed after its last.
struct LayerFile {
  std::string shown;
  uint64_t firstBlock = 0, left = 0; ///< blocks
  llvm::MutableArrayRef<Tensor> tensors;
  bool open = false;
  std::unique_ptr<StagedFile> file;
};

constexpr uint64_t idOffset = 4096;

class Packer {
public:
  Packer(llvm::ArrayRef<LayerSpec> layers, llvm::ArrayRef<std::array<uint8_t, 32>> ids,
         const PackPlan &plan, llvm::ArrayRef<std::unique_ptr<WeightReader>> readers,
         llvm::StringRef folder, const PackProgress &progress)
      : layers(layers), ids(ids), plan(plan), readers(readers), folder(folder), progress(progress),
        buffers(readers.size()) {}

  llvm::Error run();

private:
  llvm::Error lay();
  llvm::Error pack(unsigned worker, uint64_t number);
  llvm::Expected<llvm::ArrayRef<char>> packRows(unsigned worker, const Tensor &tensor,
                                                int64_t expert, int64_t row0, int64_t row1);
  llvm::Error begin(size_t layer);
  llvm::Error end(size_t layer);

  /// Waits for blocks before `number` to make `ready` true. False: one of them failed, so that it
  /// will never be.
  bool await(uint64_t number, llvm::function_ref<bool()> ready) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return ready() || failed < number; });
    return ready();
  }
  /// Changes what others wait for.
  void change(llvm::function_ref<void()> edit) {
    std::lock_guard<std::mutex> lock(mutex);
    edit();
    changed.notify_all();
  }
  /// What a block that waited in vain says; nobody hears it, as parallelFor returns the error of
  /// the smallest number.
  llvm::Error inVain(const LayerFile &file) {
    return makeError(ErrorCode::INTERNAL, file.shown, "the blocks before to be packed",
                     "a failure");
  }

  llvm::ArrayRef<LayerSpec> layers;
  llvm::ArrayRef<std::array<uint8_t, 32>> ids;
  const PackPlan &plan;
  llvm::ArrayRef<std::unique_ptr<WeightReader>> readers;
  llvm::StringRef folder;
  const PackProgress &progress;

  std::vector<Tensor> tensors;
  std::vector<LayerFile> files;
  std::vector<std::vector<char>> buffers; // of the workers
  std::mutex mutex;                       // of what changes in tensors and files, and of `progress`
  std::condition_variable changed;
  uint64_t failed = UINT64_MAX; // the smallest block that failed
};

} // namespace

/// Where every block of every tensor belongs.
llvm::Error Packer::lay() {
  size_t count = 0;
  for (const LayerSpec &layer : layers)
    count += layer.weights.size();
  tensors.reserve(count);
  files.resize(layers.size());
  uint64_t blocks = 0;
  for (auto [number, layer] : llvm::enumerate(layers)) {
    LayerFile &file = files[number];
    file.shown = layer.name + ".safetensors";
    file.firstBlock = blocks;
    size_t first = tensors.size();
    uint64_t offset = idOffset + sizeof(moec_id_block);
    for (auto [weight, target] : llvm::zip_equal(layer.weights, packedWeights(layer))) {
      Tensor &tensor = tensors.emplace_back();
      tensor.weight = &weight;
      tensor.layer = number;
      tensor.firstBlock = blocks;
      tensor.step = rowsPerBlock(weight, plan);
      tensor.blocksPerExpert = llvm::divideCeil(weight.rows, tensor.step);
      tensor.blocks = blocksOf(weight, plan);
      tensor.offset = offset;
      tensor.bytes = target.bytes;
      XXH3_64bits_reset(&tensor.hash);
      if (moec_pack_tensor_bytes(layoutOf(weight), dtypeNumber(weight.format), weight.experts,
                                 static_cast<int32_t>(weight.parts), weight.rows,
                                 weight.cols) != target.bytes)
        return makeError(ErrorCode::INTERNAL, file.shown,
                         "the packer's size of `" + weight.role + "`", llvm::Twine(target.bytes));
      blocks += tensor.blocks;
      offset += target.bytes;
    }
    file.tensors = llvm::MutableArrayRef<Tensor>(tensors).drop_front(first);
    file.left = blocks - file.firstBlock;
  }
  return llvm::Error::success();
}

llvm::Error Packer::run() {
  if (llvm::Error error = lay())
    return error;
  uint64_t blocks = tensors.empty() ? 0 : tensors.back().firstBlock + tensors.back().blocks;
  return parallelFor(blocks, readers.size(), [&](unsigned worker, size_t number) {
    llvm::Error error = pack(worker, number);
    if (error)
      change([&] { failed = std::min<uint64_t>(failed, number); });
    return error;
  });
}

llvm::Error Packer::begin(size_t layer) {
  LayerFile &file = files[layer];
  change([&] { progress.layer(layers[layer].name); });
  auto created = StagedFile::create((folder + "/" + file.shown).str(), file.shown);
  if (!created)
    return created.takeError();
  if (llvm::Error error = (*created)->reserve(packedFileBytes(layers[layer])))
    return error;
  change([&] {
    file.file = std::move(*created);
    file.open = true;
  });
  return llvm::Error::success();
}

llvm::Error Packer::end(size_t layer) {
  LayerFile &file = files[layer];
  uint64_t dataBegin = 0;
  std::vector<PackedWeight> packed = packedWeights(layers[layer]);
  std::string head = packedHead(layers[layer], packed, dataBegin);
  moec_id_block block;
  memset(&block, 0, sizeof(block));
  if (dataBegin != idOffset)
    return makeError(ErrorCode::INTERNAL, file.shown, "a header of at most 4096 bytes",
                     llvm::Twine(dataBegin) + " bytes");
  if (packed.size() > std::size(block.tensors))
    return makeError(ErrorCode::INTERNAL, file.shown, "at most 16 tensors",
                     llvm::Twine(packed.size()));
  memcpy(block.magic, "MOECPACK", 8);
  block.schema = 1;
  block.tensor_count = static_cast<uint32_t>(packed.size());
  memcpy(block.id, ids[layer].data(), 32);
  block.file_bytes = file.tensors.back().offset + file.tensors.back().bytes;
  memcpy(block.layout, packedLayout.data(), packedLayout.size());
  for (auto [tensor, target, row] : llvm::zip_first(file.tensors, packed, block.tensors)) {
    memcpy(row.role, target.role.data(),
           std::min<size_t>(target.role.size(), sizeof(row.role) - 1));
    const char *dtype = target.format == "f32" ? "F32" : "BF16";
    memcpy(row.dtype, dtype, strlen(dtype));
    row.offset = tensor.offset;
    row.bytes = tensor.bytes;
    row.xxh3 = XXH3_64bits_digest(&tensor.hash);
  }
  if (llvm::Error error = file.file->writeAt(head.data(), head.size(), 0))
    return error;
  if (llvm::Error error = file.file->writeAt(&block, sizeof(block), idOffset))
    return error;
  return file.file->close();
}

/// Packs rows of one expert into the worker's buffer.
llvm::Expected<llvm::ArrayRef<char>> Packer::packRows(unsigned worker, const Tensor &tensor,
                                                      int64_t expert, int64_t row0, int64_t row1) {
  const WeightSpec &weight = *tensor.weight;
  const LayerSpec &layer = layers[tensor.layer];
  int32_t parts = static_cast<int32_t>(weight.parts);
  int64_t lanes = moec_pack_panel_rows(parts);
  uint64_t panel = panelBytes(weight);
  std::vector<char> &buffer = buffers[worker];
  uint64_t size = llvm::divideCeil(row1 - row0, lanes) * panel;
  if (buffer.size() < size)
    buffer.resize(size);
  // The packer is given where the expert's memory would begin.
  void *expertBase =
      reinterpret_cast<void *>(reinterpret_cast<uintptr_t>(buffer.data()) - row0 / lanes * panel);
  for (int32_t part = 0; part < parts; ++part) {
    auto rows = readers[worker]->read(layer, weight, expert, part, row0, row1);
    if (!rows)
      return rows.takeError();
    int64_t bad = moec_pack(layoutOf(weight), expertBase, dtypeNumber(weight.format), parts, part,
                            weight.rows, weight.cols, row0, row1, &rows->source);
    if (bad >= 0)
      return makeError(ErrorCode::NONFINITE, layer.name + ": tensor `" + rows->tensor + "`",
                       "finite numbers",
                       "NaN or infinity at row " + llvm::Twine(bad / weight.cols) + ", column " +
                           llvm::Twine(bad % weight.cols) + " of part " + llvm::Twine(part) +
                           " of expert " + llvm::Twine(expert),
                       "the checkpoint is damaged, or overflowed in training");
  }
  return llvm::ArrayRef<char>(buffer.data(), size);
}

llvm::Error Packer::pack(unsigned worker, uint64_t number) {
  auto after = llvm::upper_bound(
      tensors, number, [](uint64_t n, const Tensor &tensor) { return n < tensor.firstBlock; });
  Tensor &tensor = *std::prev(after);
  LayerFile &file = files[tensor.layer];
  if (number == file.firstBlock) {
    if (llvm::Error error = begin(tensor.layer))
      return error;
  } else if (!await(number, [&] { return file.open; })) {
    return inVain(file);
  }

  const WeightSpec &weight = *tensor.weight;
  uint64_t block = number - tensor.firstBlock;
  int64_t expert = block / tensor.blocksPerExpert;
  int64_t row0 = block % tensor.blocksPerExpert * tensor.step;
  int64_t row1 = std::min(weight.rows, row0 + tensor.step);
  auto rows = packRows(worker, tensor, expert, row0, row1);
  if (!rows)
    return rows.takeError();

  // Every block but an expert's last is `step` rows.
  int64_t lanes = moec_pack_panel_rows(static_cast<int32_t>(weight.parts));
  uint64_t panel = panelBytes(weight);
  uint64_t at = (expert * llvm::divideCeil(weight.rows, lanes) + row0 / lanes) * panel;
  char zeros[4096] = {};
  uint64_t padding = block + 1 == tensor.blocks ? tensor.bytes - at - rows->size() : 0;
  if (!await(number, [&] { return tensor.turn == block; }))
    return inVain(file);
  XXH3_64bits_update(&tensor.hash, rows->data(), rows->size());
  XXH3_64bits_update(&tensor.hash, zeros, padding);
  change([&] { ++tensor.turn; });

  if (llvm::Error error = file.file->writeAt(rows->data(), rows->size(), tensor.offset + at))
    return error;
  if (llvm::Error error = file.file->writeAt(zeros, padding, tensor.offset + at + rows->size()))
    return error;
  bool last = false;
  change([&] {
    progress.advance(rows->size() + padding);
    last = --file.left == 0;
  });
  return last ? end(tensor.layer) : llvm::Error::success();
}

llvm::Error packLayers(llvm::ArrayRef<LayerSpec> layers,
                       llvm::ArrayRef<std::array<uint8_t, 32>> ids, const PackPlan &plan,
                       llvm::ArrayRef<std::unique_ptr<WeightReader>> readers,
                       llvm::StringRef folder, const PackProgress &progress) {
  return Packer(layers, ids, plan, readers, folder, progress).run();
}

} // namespace moec
