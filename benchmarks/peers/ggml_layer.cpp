// Runs llama.cpp's MoE graph on the CPU backend for ggml_peer.py: mul_mat_id up and gate, swiglu,
// mul_mat_id down, weights, sum. Compiled by setup_peers.sh against libggml.
//
//   ggml_layer H F E K f32|bf16 THREADS BANKS WEIGHTS
//
// WEIGHTS: for every expert gate [F,H], up [F,H], down [H,F] as f32. First line of output: the
// buffer type that holds the weights. Then a line each: "PATH T BANK KEEP", PATH holding x f32
// [T,H], ids i32 [T,K], weights f32 [T,K]; answers a line when done; with KEEP writes PATH.out.
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

struct Weights {
  ggml_tensor *gate, *up, *down;
};

struct Graph {
  ggml_tensor *x, *ids, *weights, *y;
  ggml_cgraph *graph;
};

int main(int argc, char **argv) {
  if (argc != 9)
    return 2;
  const int64_t H = atol(argv[1]), F = atol(argv[2]), E = atol(argv[3]), K = atol(argv[4]);
  const ggml_type type = std::string(argv[5]) == "f32" ? GGML_TYPE_F32 : GGML_TYPE_BF16;
  ggml_backend_t backend = ggml_backend_cpu_init();
  ggml_backend_cpu_set_n_threads(backend, atoi(argv[6]));
  ggml_backend_dev_t device = ggml_backend_get_device(backend);

  // The buffer type that llama.cpp would take: the first whose device supports the operation.
  std::vector<ggml_backend_buffer_type_t> types;
  auto extra =
      reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
          ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  if (extra)
    for (ggml_backend_buffer_type_t *t = extra(device); t && *t; ++t)
      types.push_back(*t);
  types.push_back(ggml_backend_get_default_buffer_type(backend));
  const ggml_init_params small = {ggml_tensor_overhead() * 64, nullptr, true};
  ggml_backend_buffer_type_t chosen = nullptr;
  for (ggml_backend_buffer_type_t candidate : types) {
    ggml_context *context = ggml_init(small);
    ggml_tensor *x = ggml_new_tensor_3d(context, GGML_TYPE_F32, H, K, 8);
    ggml_tensor *ids = ggml_new_tensor_2d(context, GGML_TYPE_I32, K, 8);
    ggml_tensor *w = ggml_new_tensor_3d(context, type, H, F, E);
    ggml_tensor *op = ggml_mul_mat_id(context, w, x, ids);
    w->buffer = ggml_backend_buft_alloc_buffer(candidate, 0);
    const bool fits = ggml_backend_dev_supports_op(device, op);
    ggml_backend_buffer_free(w->buffer);
    ggml_free(context);
    if (fits) {
      chosen = candidate;
      break;
    }
  }
  if (!chosen)
    return 3;

  std::vector<Weights> banks;
  for (int bank = 0; bank < atoi(argv[7]); ++bank) {
    ggml_context *context = ggml_init(small);
    Weights w = {ggml_new_tensor_3d(context, type, H, F, E),
                 ggml_new_tensor_3d(context, type, H, F, E),
                 ggml_new_tensor_3d(context, type, F, H, E)};
    if (!ggml_backend_alloc_ctx_tensors_from_buft(context, chosen))
      return 4;
    std::ifstream file(argv[8], std::ios::binary);
    std::vector<float> values(H * F);
    std::vector<char> gate(ggml_nbytes(w.gate)), up(ggml_nbytes(w.up)), down(ggml_nbytes(w.down));
    const size_t one = gate.size() / E;
    for (int64_t e = 0; e < E; ++e)
      for (std::vector<char> *into : {&gate, &up, &down}) {
        file.read(reinterpret_cast<char *>(values.data()), values.size() * 4);
        if (!file)
          return 5;
        const float *from = values.data();
        if (type == GGML_TYPE_F32)
          memcpy(into->data() + e * one, from, one);
        else
          ggml_fp32_to_bf16_row(from, reinterpret_cast<ggml_bf16_t *>(into->data() + e * one),
                                H * F);
      }
    ggml_backend_tensor_set(w.gate, gate.data(), 0, gate.size());
    ggml_backend_tensor_set(w.up, up.data(), 0, up.size());
    ggml_backend_tensor_set(w.down, down.data(), 0, down.size());
    banks.push_back(w);
  }
  printf("weights in %s\n", ggml_backend_buft_name(chosen));
  fflush(stdout);

  // One graph for each number of tokens and bank; inputs are kept once read.
  std::map<std::pair<int64_t, int>, Graph> graphs;
  std::map<std::string, std::string> inputs;
  std::string path;
  int64_t T;
  int bank, keep;
  while (std::cin >> path >> T >> bank >> keep) {
    auto [at, isNew] = graphs.try_emplace({T, bank});
    Graph &g = at->second;
    if (isNew) {
      const Weights &w = banks[bank];
      ggml_context *c =
          ggml_init({ggml_tensor_overhead() * 256 + ggml_graph_overhead(), nullptr, true});
      g.x = ggml_new_tensor_3d(c, GGML_TYPE_F32, H, 1, T);
      g.ids = ggml_new_tensor_2d(c, GGML_TYPE_I32, K, T);
      g.weights = ggml_new_tensor_3d(c, GGML_TYPE_F32, 1, K, T);
      ggml_tensor *h = ggml_swiglu_split(c, ggml_mul_mat_id(c, w.gate, g.x, g.ids),
                                         ggml_mul_mat_id(c, w.up, g.x, g.ids));
      ggml_tensor *d = ggml_mul(c, ggml_mul_mat_id(c, w.down, h, g.ids), g.weights);
      for (int64_t k = 0; k < K; ++k) {
        ggml_tensor *slot = ggml_view_2d(c, d, H, T, d->nb[2], k * d->nb[1]);
        g.y = k ? ggml_add(c, g.y, slot) : slot;
      }
      g.graph = ggml_new_graph(c);
      ggml_build_forward_expand(g.graph, g.y);
      if (!ggml_backend_alloc_ctx_tensors(c, backend))
        return 6;
    }
    std::string &bytes = inputs[path];
    if (bytes.empty()) {
      std::ifstream file(path, std::ios::binary);
      bytes.assign(std::istreambuf_iterator<char>(file), {});
    }
    const char *from = bytes.data();
    for (ggml_tensor *t : {g.x, g.ids, g.weights}) {
      ggml_backend_tensor_set(t, from, 0, ggml_nbytes(t));
      from += ggml_nbytes(t);
    }
    if (ggml_backend_graph_compute(backend, g.graph) != GGML_STATUS_SUCCESS)
      return 7;
    if (keep) {
      std::vector<char> y(ggml_nbytes(g.y));
      ggml_backend_tensor_get(g.y, y.data(), 0, y.size());
      std::ofstream(path + ".out", std::ios::binary).write(y.data(), y.size());
    }
    puts("done");
    fflush(stdout);
  }
}
