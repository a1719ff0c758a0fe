// libFuzzer over tokenizer.json: a file, a zero byte, and a text to encode and decode.
//
//     clang++ -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz_tokenizer.cpp
//         -o build/fuzz_tokenizer -lpcre2-8 -lutf8proc
//     build/fuzz_tokenizer -max_total_time=300 -timeout=20 -rss_limit_mb=2000 build/corpus
#include <cstdlib>

#include "../tokenizer.hpp"

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

void use(const mamba::Tokenizer& tokenizer, std::string_view text) {
  std::vector<mamba::Token> ids = tokenizer.encode_prompt(text);
  tokenizer.decode(ids);
  for (const char c : text) ids.push_back(c);  // ids that may be anything
  for (const bool skip : {false, true}) {
    mamba::StreamDecoder decoder(tokenizer, skip);
    std::string streamed;
    for (const mamba::Token id : ids) streamed += decoder.push(id);
    streamed += decoder.finish();
    require(streamed == tokenizer.decode(ids, skip));
    std::string valid;
    mamba::bpe::append_bytes(streamed, false, valid);
    require(valid == streamed);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::size_t zero = std::min(input.find('\0'), size);
  try {
    use(mamba::Tokenizer::from_text(input.substr(0, zero), "file"),
        zero < size ? input.substr(zero + 1) : "ab <s>abc \xff\xe2\x9c\x93");
  } catch (const std::runtime_error& error) {
    const std::string line = error.what();
    require(line.find('\n') == line.npos && line.find("json.exception") == line.npos);
  }
  return 0;
}
