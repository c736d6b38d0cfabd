//===- PackedFile.cpp - reading packed weight files back ------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "moe/Export/Weights.h"
#include "moe/Support/Files.h"

#include "llvm/ADT/StringExtras.h"

#include <cstring>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace moec {

static std::string boundedText(const char *text, size_t most) {
  return std::string(text, strnlen(text, most));
}

llvm::Expected<PackedFile> readPackedHeader(llvm::StringRef path) {
  auto opened = InputFile::open(path);
  if (!opened)
    return opened.takeError();
  InputFile &in = **opened;
  auto broken = [&](const llvm::Twine &expected, const llvm::Twine &got) {
    return makeError(ErrorCode::FILE_FORMAT, path, expected, got, "pack the weights again");
  };
  if (in.size() < 8192)
    return broken("a packed weight file of at least 8192 bytes", llvm::Twine(in.size()) + " bytes");
  moec_id_block block;
  if (llvm::Error error = in.readAt(
          4096, llvm::MutableArrayRef<char>(reinterpret_cast<char *>(&block), sizeof(block))))
    return std::move(error);
  if (memcmp(block.magic, "MOECPACK", 8))
    return broken("weights packed by moec", "another file");
  if (block.schema > 1)
    return makeError(ErrorCode::ABI, path, "schema 1", "schema " + llvm::Twine(block.schema),
                     "a newer moec packed it");
  if (block.tensor_count > std::size(block.tensors))
    return broken("at most 16 tensors", llvm::Twine(block.tensor_count));
  if (block.file_bytes != in.size())
    return broken(llvm::Twine(block.file_bytes) + " bytes", llvm::Twine(in.size()) + " bytes");
  PackedFile file;
  memcpy(file.id.data(), block.id, 32);
  file.layout = boundedText(block.layout, sizeof(block.layout));
  file.bytes = in.size();
  for (uint32_t i = 0; i < block.tensor_count; ++i) {
    const moec_id_tensor &row = block.tensors[i];
    PackedTensor tensor{boundedText(row.role, sizeof(row.role)),
                        boundedText(row.dtype, sizeof(row.dtype)), row.offset, row.bytes, row.xxh3};
    if (tensor.offset % 4096 || tensor.bytes % 4096 || tensor.offset < 8192 ||
        tensor.offset > in.size() || tensor.bytes > in.size() - tensor.offset)
      return broken("tensor `" + tensor.role + "` on whole pages within the file",
                    "bytes " + llvm::Twine(tensor.offset) + " + " + llvm::Twine(tensor.bytes));
    file.tensors.push_back(std::move(tensor));
  }
  return file;
}

llvm::Error checkPackedBytes(llvm::StringRef path, const PackedFile &file,
                             const PackProgress &progress) {
  auto opened = InputFile::open(path);
  if (!opened)
    return opened.takeError();
  std::vector<char> buffer(4u << 20);
  for (const PackedTensor &tensor : file.tensors) {
    XXH3_state_t hash;
    XXH3_64bits_reset(&hash);
    for (uint64_t done = 0; done < tensor.bytes;) {
      size_t size = std::min<uint64_t>(buffer.size(), tensor.bytes - done);
      if (llvm::Error error = (*opened)->readAt(tensor.offset + done,
                                                llvm::MutableArrayRef<char>(buffer.data(), size)))
        return error;
      XXH3_64bits_update(&hash, buffer.data(), size);
      done += size;
      progress.advance(size);
    }
    uint64_t found = XXH3_64bits_digest(&hash);
    if (found != tensor.hash)
      return makeError(ErrorCode::HASH, path.str() + ": tensor `" + tensor.role + "`",
                       "XXH3 " + llvm::utohexstr(tensor.hash, true, 16),
                       llvm::utohexstr(found, true, 16),
                       "the file was damaged or changed; pack the weights again");
  }
  return llvm::Error::success();
}

} // namespace moec
