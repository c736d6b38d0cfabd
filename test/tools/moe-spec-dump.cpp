//===- moe-spec-dump.cpp - prints what the importer understood ------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//
//
// A test tool: the library functions of lib/Support and lib/Spec, one option
// each. Prints JSON on stdout; an error goes to stderr as JSON, and its class is
// the exit code.
//
//===----------------------------------------------------------------------===//

#include "moe/Spec/Load.h"
#include "moe/Support/Files.h"
#include "moe/Support/JSON.h"

#include "llvm/Support/CommandLine.h"
#include "llvm/Support/FormatVariadic.h"
#include "llvm/Support/raw_ostream.h"

using namespace moec;
namespace cl = llvm::cl;

static cl::list<std::string> inputs(cl::Positional, cl::desc("MODEL..."), cl::OneOrMore);
static cl::opt<std::string> models("models", cl::desc("folder of shipped rows"));
static cl::list<std::string> rows("model-rows", cl::desc("a user's rows"));
static cl::opt<std::string> checkpoint("checkpoint", cl::desc("weights from elsewhere"));
static cl::opt<std::string> dtype("dtype", cl::init("auto"), cl::desc("auto, f32 or bf16"));
static cl::opt<bool> followLinks("follow-links");
static cl::opt<bool> shapesOnly("shapes-only");
static cl::opt<bool> check("check", cl::desc("refuse what is not implemented"));
static cl::opt<bool> origins("origins");
static cl::opt<bool> safetensors("safetensors", cl::desc("MODEL is one safetensors file"));
static cl::opt<bool> batch("batch", cl::desc("one line for each MODEL: `ok`, or the error"));
static cl::opt<std::string> weight("weight", cl::desc("LAYER:ROLE to write as f32"));
static cl::opt<std::string> output("o", cl::desc("file of --weight"));
static cl::opt<std::string> against("against",
                                    cl::desc("compare the first layer with this spec's"));

/// Writes [E][parts][rows][cols] as f32.
static llvm::Error writeWeight(const LoadedModel &model) {
  auto [layerName, role] = llvm::StringRef(weight).split(':');
  for (const LayerSpec &layer : model.spec.layers) {
    const WeightSpec *w = layer.weight(role);
    if (layer.name != layerName || !w)
      continue;
    std::vector<float> values(w->elements());
    std::vector<char> buffer;
    float *next = values.data();
    for (int64_t e = 0; e < w->experts; ++e)
      for (int64_t p = 0; p < w->parts; ++p) {
        llvm::Expected<MatrixExtent> at = model.checkpoint->locate(*w, e, p);
        if (!at)
          return at.takeError();
        if (at->encoding != Encoding::Plain) {
          std::vector<char> decoded;
          if (llvm::Error error =
                  model.checkpoint->decode(*at, 0, at->rows, w->format, buffer, decoded))
            return error;
          toFloat(w->format == Format::F32 ? Dtype::F32 : Dtype::BF16, decoded.data(),
                  at->rows * at->cols, next);
          next += at->rows * at->cols;
          continue;
        }
        if (llvm::Error error = model.checkpoint->read(*at, buffer))
          return error;
        size_t size = bitsOf(at->dtype) / 8;
        NonFinite found;
        scanNonFinite(at->dtype, buffer.data(), buffer.size() / size, at->firstElement, found);
        if (llvm::Error error = checkFinite(found, at->file->file().path(), at->tensor))
          return error;
        for (int64_t r = 0; r < at->rows; ++r)
          for (int64_t c = 0; c < at->cols; ++c)
            toFloat(at->dtype,
                    buffer.data() + (at->start + r * at->rowStride + c * at->colStride) * size, 1,
                    next++);
      }
    std::error_code code;
    llvm::raw_fd_ostream os(output, code);
    if (code)
      return systemError(output, "write the file", code.value());
    os.write(reinterpret_cast<const char *>(values.data()), sizeof(float) * values.size());
    return llvm::Error::success();
  }
  return makeError(ErrorCode::ARGUMENT, "--weight", "LAYER:ROLE of this model", weight);
}

static llvm::Error run(llvm::StringRef input) {
  if (safetensors) {
    llvm::Expected<std::unique_ptr<Checkpoint>> file = Checkpoint::openFile(input);
    if (!file)
      return file.takeError();
    if (batch)
      return llvm::Error::success();
    llvm::json::Object out;
    for (const std::string &name : (*file)->names())
      out[llvm::json::fixUTF8(name)] = describe(*(*file)->find(name));
    llvm::outs() << llvm::json::Value(std::move(out)) << "\n";
    return llvm::Error::success();
  }
  llvm::Expected<ModelTable> table = ModelTable::load(models, rows);
  if (!table)
    return table.takeError();
  LoadOptions options;
  options.checkpoint = checkpoint;
  options.followLinks = followLinks;
  options.shapesOnly = shapesOnly;
  if (dtype != "auto")
    options.dtype = dtype == "f32" ? Format::F32 : Format::BF16;
  llvm::Expected<LoadedModel> model = loadModel(input, *table, options);
  if (!model)
    return model.takeError();
  if (batch)
    return check ? checkModel(model->spec) : llvm::Error::success();
  if (check)
    if (llvm::Error error = checkModel(model->spec))
      return error;
  if (!weight.empty())
    return writeWeight(*model);
  llvm::json::Object out{{"spec", toJSON(model->spec, origins)},
                         {"notes", llvm::json::Array(model->spec.notes)},
                         {"weights", model->checkpoint != nullptr},
                         {"layers", llvm::json::Array()}};
  for (const LayerSpec &layer : model->spec.layers)
    out.getArray("layers")->push_back(llvm::json::Object{{"name", layer.name},
                                                         {"total", layer.totalParameters()},
                                                         {"active", layer.activeParameters()},
                                                         {"semantics", semantics(layer)}});
  if (!against.empty()) {
    llvm::Expected<LoadedModel> other = loadModel(against, *table, {});
    if (!other)
      return other.takeError();
    llvm::json::Array differences;
    for (const Difference &d : compare(model->spec.layers[0], other->spec.layers[0]))
      differences.push_back(llvm::json::Array{d.attribute, d.left, d.right});
    out["differences"] = std::move(differences);
  }
  llvm::outs() << llvm::formatv("{0:2}", llvm::json::Value(std::move(out))) << "\n";
  return llvm::Error::success();
}

int main(int argc, char **argv) {
  cl::ParseCommandLineOptions(argc, argv, "prints what the importer understood\n");
  if (models.empty())
    models = shippedModelRows(argv[0], reinterpret_cast<void *>(&main));
  if (batch) {
    for (const std::string &input : inputs) {
      if (llvm::Error error = run(input))
        llvm::outs() << llvm::json::Value(takeErrors(std::move(error)).front().toJSON()) << "\n";
      else
        llvm::outs() << "\"ok\"\n";
    }
    return 0;
  }
  llvm::Error error = run(inputs.front());
  if (!error)
    return 0;
  Error first = takeErrors(std::move(error)).front();
  llvm::errs() << llvm::json::Value(first.toJSON()) << "\n";
  return exitCode(first.code);
}
