// llama.cpp as a program to count instructions of: llama_tokens MODEL ID,ID,... N
// prints N greedy tokens, on one thread. Built for a Cortex-A76 from llama.cpp's folder, with Debian's
// g++-aarch64-linux-gnu:
//   cmake -B build -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
//     -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
//     -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF \
//     -DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod+fp16 -DCMAKE_CXX_FLAGS=-mtune=cortex-a76
//   cmake --build build --target llama
//   aarch64-linux-gnu-g++ -O2 -static llama_tokens.cpp -Iinclude -Iggml/include build/src/libllama.a \
//     build/ggml/src/libggml.a build/ggml/src/libggml-cpu.a build/ggml/src/libggml-base.a -o llama_tokens

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "llama.h"

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
  llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
  if (!model) return 1;
  std::vector<llama_token> ids;
  for (const char *at = argv[2]; *at; at += *at == ',') ids.push_back(strtol(at, (char **)&at, 10));
  llama_context_params params = llama_context_default_params();
  params.n_ctx = params.n_batch = 512;
  params.n_threads = params.n_threads_batch = 1;
  llama_context *context = llama_init_from_model(model, params);
  int size = llama_vocab_n_tokens(llama_model_get_vocab(model));
  llama_batch batch = llama_batch_get_one(ids.data(), ids.size());
  for (int i = 0; i < atoi(argv[3]); i++) {
    if (llama_decode(context, batch)) return 1;
    const float *logits = llama_get_logits_ith(context, -1);
    ids = {llama_token(std::max_element(logits, logits + size) - logits)};
    printf(i ? ",%d" : "%d", ids[0]);
    batch = llama_batch_get_one(ids.data(), 1);
  }
  printf("\n");
  fflush(stdout);
  _Exit(0);  // freeing everything is not what is counted
}
