// A prompt through llama.cpp's C API, without a server: complete MODEL.gguf PROMPT NEW_TOKENS THREADS
// `complete --sizes` prints the sizes of the structures that cross the border between program and library.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "llama.h"

static void silent(ggml_log_level, const char *, void *) {}

static int fail(const char *what) {
    std::fprintf(stderr, "%s\n", what);
    return 1;
}

int main(int argc, char **argv) {
    if (argc == 2 && !std::strcmp(argv[1], "--sizes")) {
        std::printf("{\"llama_model_params\": %zu, \"llama_context_params\": %zu, \"llama_batch\": %zu}\n",
                    sizeof(llama_model_params), sizeof(llama_context_params), sizeof(llama_batch));
        return 0;
    }
    if (argc != 5) return fail("usage: complete MODEL.gguf PROMPT NEW_TOKENS THREADS");
    const std::string prompt = argv[2];
    const int most = std::atoi(argv[3]), threads = std::atoi(argv[4]);

    llama_log_set(silent, nullptr);
    llama_backend_init();
    llama_model_params how = llama_model_default_params();
    how.n_gpu_layers = 0;
    llama_model *model = llama_model_load_from_file(argv[1], how);
    if (!model) return fail("the model cannot be loaded");
    const llama_vocab *vocab = llama_model_get_vocab(model);

    // a first call with no room tells how many tokens there are, as a negative number
    const int count = -llama_tokenize(vocab, prompt.c_str(), (int)prompt.size(), nullptr, 0, true, true);
    std::vector<llama_token> ids(count);
    llama_tokenize(vocab, prompt.c_str(), (int)prompt.size(), ids.data(), count, true, true);

    llama_context_params room = llama_context_default_params();
    room.n_ctx = count + most;
    room.n_batch = count;
    room.n_threads = room.n_threads_batch = threads;
    llama_context *context = llama_init_from_model(model, room);
    if (!context) return fail("no context could be made");
    llama_sampler *greedy = llama_sampler_init_greedy();

    llama_batch batch = llama_batch_get_one(ids.data(), count);  // the prompt at once, then one token after another
    for (int made = 0; made < most; made++) {
        if (llama_decode(context, batch)) return fail("a pass failed");
        llama_token next = llama_sampler_sample(greedy, context, -1);
        if (llama_vocab_is_eog(vocab, next)) break;
        char piece[256];
        const int length = llama_token_to_piece(vocab, next, piece, sizeof(piece), 0, false);
        std::fwrite(piece, 1, length > 0 ? length : 0, stdout);
        ids[0] = next;
        batch = llama_batch_get_one(ids.data(), 1);
    }
    std::printf("\n");
    llama_sampler_free(greedy);
    llama_free(context);
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
