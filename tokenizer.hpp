// tokenizer.hpp: text to token ids and back.
//
// Reads a Hugging Face `tokenizer.json` that holds a byte-pair encoding (BPE), of bytes as in
// GPT-2, GPT-NeoX and all state-spaces Mamba models, or of characters with bytes to fall back
// on as in Codestral, and gives the ids and texts that the Rust library `tokenizers` gives.
//
//     Tokenizer tokenizer = Tokenizer::from_file("weights/stories/tokenizer.json");
//     std::vector<Token> ids = tokenizer.encode("Once upon a time");
//     std::string text = tokenizer.decode(ids);
//
// Encoding takes five steps:
//
//   1. Added tokens such as <|endoftext|> are cut out of the text; each is one id.
//   2. The rest is normalized, for example to Unicode normal form C: e + U+0301 becomes U+00E9.
//   3. It is split into words by the file's own pattern: "low lower" -> "low" " lower"
//   4. Every character of a word becomes a token. Byte-level files first write each byte as one
//      visible character, the space as Ġ, so that nothing is unknown; byte fallback spells a
//      character that has no token as <0xE2><0x9C><0x93>.
//   5. The pair of neighbours that comes first in the list of merges becomes one token, the
//      leftmost if it occurs twice; again, until no neighbours are in the list:
//          merges:  0 "e r"   1 "l o"   2 "lo w"   3 "Ġ low"
//          Ġ l o w e r -0-> Ġ l o w er -1-> Ġ lo w er -2-> Ġ low er -3-> Ġlow er
//
// Decoding turns each token back into bytes and joins them; only then are they text.
// `truncation` and `padding` are ignored. Anything else that a file asks for and that is not
// done here is an error that names it.
#pragma once

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <queue>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace mamba {

using Token = std::int32_t;

namespace bpe {

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream line;
  (line << ... << parts);
  throw std::runtime_error(line.str());
}

// Runs f. An error in it becomes one line that begins with the place: "decoder: WordPiece: ...".
template <class F>
void at(const std::string& place, F f) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    std::string line = place + ": " + error.what();
    const auto is_control = [](char c) { return c >= 0 && c < ' '; };
    std::replace_if(line.begin(), line.end(), is_control, ' ');
    throw std::runtime_error(line);
  }
}

// ==== UTF-8 ============================================================================

constexpr const char* kReplacement = "\xEF\xBF\xBD";  // U+FFFD, in place of what is not UTF-8

struct Character {
  std::int32_t code;  // or one of these
  std::size_t size;
  static constexpr std::int32_t kBroken = -1, kCutOff = -2;  // kCutOff: only by the text's end
};

// The character at i. Where bytes are not UTF-8: as many as begin a character before it breaks
// off; in their place comes one U+FFFD.
inline Character character_at(std::string_view text, std::size_t i) {
  const auto byte = [&](std::size_t k) { return static_cast<std::uint8_t>(text[i + k]); };
  const std::uint8_t lead = byte(0);
  if (lead < 0x80) return {lead, 1};
  if (lead < 0xC2 || lead > 0xF4) return {Character::kBroken, 1};
  const std::size_t size = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // No overlong forms (E0, F0), no surrogates (ED), nothing above U+10FFFF (F4).
  std::uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  std::uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  std::int32_t code = lead & (0x7F >> size);
  for (std::size_t k = 1; k < size; ++k) {
    if (i + k == text.size()) return {Character::kCutOff, k};
    if (byte(k) < low || byte(k) > high) return {Character::kBroken, k};
    code = code << 6 | (byte(k) & 0x3F);
    low = 0x80, high = 0xBF;
  }
  return {code, size};
}

inline void append_character(std::int32_t code, std::string& text) {
  std::array<utf8proc_uint8_t, 4> bytes{};
  const auto size = utf8proc_encode_char(code, bytes.data());
  text.append(bytes.begin(), bytes.begin() + size);
}

// Appends bytes to text, with U+FFFD for what is not UTF-8. Returns where it stopped: at
// the end, or, with keep_cut_off, at a character whose other bytes may still come.
inline std::size_t append_bytes(std::string_view bytes, bool keep_cut_off, std::string& text) {
  for (std::size_t i = 0; i < bytes.size();) {
    const Character c = character_at(bytes, i);
    if (c.code == Character::kCutOff && keep_cut_off) return i;
    text += c.code >= 0 ? bytes.substr(i, c.size) : std::string_view(kReplacement);
    i += c.size;
  }
  return bytes.size();
}

// The byte alphabet. Bytes that are visible in Latin-1 stand for themselves; the other 68, in
// order, are U+0100 to U+0143, so that the space (0x20) is U+0120, Ġ.
struct ByteAlphabet {
  std::array<std::string, 256> character;       // byte -> character
  std::unordered_map<std::int32_t, char> byte;  // its code -> byte

  ByteAlphabet() {
    for (std::int32_t b = 0, next = 0x100; b < 256; ++b) {
      const bool visible = (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD);
      const std::int32_t code = visible ? b : next++;
      append_character(code, character[b]);
      byte[code] = static_cast<char>(b);
    }
  }

  std::string to_characters(std::string_view bytes) const {
    std::string text;
    for (const char b : bytes) text += character[static_cast<std::uint8_t>(b)];
    return text;
  }

  // A token with any other character in it (only added tokens have them) is its own bytes.
  std::string to_bytes(const std::string& token) const {
    std::string bytes;
    for (std::size_t i = 0; i < token.size(); i += character_at(token, i).size) {
      const auto found = byte.find(character_at(token, i).code);
      if (found == byte.end()) return token;
      bytes += found->second;
    }
    return bytes;
  }
};
inline const ByteAlphabet kByteAlphabet;

// The tokens of byte fallback: "<0xE2>" -> byte.
inline const auto kFallbackBytes = [] {
  std::unordered_map<std::string, std::uint8_t> bytes;
  const std::string hex = "0123456789ABCDEF";
  for (int b = 0; b < 256; ++b) bytes[std::string("<0x") + hex[b / 16] + hex[b % 16] + ">"] = b;
  return bytes;
}();

// ==== Patterns =========================================================================

// A pattern of PCRE2, or a text to be found as it is. Work and memory of one search are bounded.
class Regex {
 public:
  explicit Regex(const std::string& pattern, bool literal = false) {
    const std::string limits = literal ? "" : "(*LIMIT_MATCH=100000000)(*LIMIT_HEAP=65536)";  // KiB
    const std::uint32_t regex = PCRE2_UCP | PCRE2_MULTILINE;
    const std::string text = limits + pattern;
    int error = 0;
    PCRE2_SIZE place = 0;
    code_.reset(
        pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                      PCRE2_UTF | (literal ? PCRE2_LITERAL : regex), &error, &place, nullptr),
        pcre2_code_free);
    std::array<PCRE2_UCHAR, 256> why{};
    if (!code_) pcre2_get_error_message(error, why.data(), why.size());
    check(code_ != nullptr, "the pattern is wrong at byte ", place - limits.size(), ": ",
          why.data());
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);  // where there is no JIT: slower
  }

  // The first match that begins at `from` or behind it: its begin and end.
  std::optional<std::pair<std::size_t, std::size_t>> find(std::string_view text,
                                                          std::size_t from = 0) const {
    static thread_local const std::shared_ptr<pcre2_match_data> match(
        pcre2_match_data_create(1, nullptr), pcre2_match_data_free);
    const auto run = [&](std::uint32_t options) {
      return pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                         options, match.get(), nullptr);
    };
    int result = run(PCRE2_NO_UTF_CHECK);
    if (result == PCRE2_ERROR_JIT_STACKLIMIT) result = run(PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT);
    if (result == PCRE2_ERROR_NOMATCH) return std::nullopt;
    check(result >= 0, "a pattern takes too much time or memory on this text");
    const PCRE2_SIZE* place = pcre2_get_ovector_pointer(match.get());
    return std::pair(place[0], place[1]);
  }

  // Calls on_part(begin, end, is_match) for the matches and for what is between them, in order.
  template <class OnPart>
  void for_each_part(std::string_view text, OnPart on_part) const {
    std::size_t done = 0;
    bool matched = false;
    for (std::size_t from = 0; from <= text.size();) {
      const auto match = find(text, from);
      if (!match) break;
      const auto [begin, end] = *match;
      if (matched && begin == end && begin == done) {  // no empty match behind a match
        from += from < text.size() ? character_at(text, from).size : 1;
        continue;
      }
      if (done < begin) on_part(done, begin, false);
      on_part(begin, end, true);
      matched = true;
      done = from = end;
    }
    if (done < text.size()) on_part(done, text.size(), false);
  }

 private:
  std::shared_ptr<pcre2_code> code_;
};

// ==== From text to words ===============================================================

using Change = std::function<std::string(std::string_view text)>;

// Puts content in place of every match.
struct Replace {
  Regex regex;
  std::string content;

  std::string operator()(std::string_view text) const {
    std::string out;
    regex.for_each_part(text, [&](std::size_t begin, std::size_t end, bool is_match) {
      out += is_match ? std::string_view(content) : text.substr(begin, end - begin);
      check(out.size() < 1 << 30, "replacing makes a text of 1 GiB or more");
    });
    return out;
  }
};

// Files write patterns in the syntax of Oniguruma. Taken is what PCRE2 reads in the same way,
// and \s and \S, for which PCRE2 has one character more than Oniguruma.
inline Regex file_pattern(const std::string& pattern) {
  static const Regex known(
      R"((?x) \A (?: [^][\\(){}] | \) | \\[pPx]\{\^?\w+} | \\x[\da-fA-F]{2} | \\[dDsSrntAz\W_]
      | \((?!\?|\*) | \(\?(?:[:=!>]|<[=!]|i[:)]) | \{\d+(?:,\d*)?}(?!\+)
      | \[\^?(?: [^][\\&] | &(?!&) | \\[pPx]\{\^?\w+} | \\x[\da-fA-F]{2}
               | \\[dDsSrnt\W_] )+] )*+)");
  static const Replace space = {Regex(R"(\\[^s](*SKIP)(*F)|\\s)"), "\\p{White_Space}"};
  static const Replace other = {Regex(R"(\\[^S](*SKIP)(*F)|\\S)"), "\\P{White_Space}"};
  const std::size_t end = known.find(pattern)->second;
  check(end == pattern.size(), "the pattern is not supported from here: ", pattern.substr(end));
  return Regex(other(space(pattern)));
}

// Unicode normal form C of valid text: decompose, sort marks by combining class, compose.
// (utf8proc would sort as well, but in quadratic time on a long run of marks.)
inline std::string nfc_of_segment(std::string_view text) {
  std::vector<utf8proc_int32_t> codes;
  std::array<utf8proc_int32_t, 8> parts{};  // the longest decomposition has 4
  for (std::size_t i = 0; i < text.size(); i += character_at(text, i).size) {
    const auto count = utf8proc_decompose_char(character_at(text, i).code, parts.data(),
                                               parts.size(), UTF8PROC_DECOMPOSE, nullptr);
    codes.insert(codes.end(), parts.begin(), parts.begin() + count);
  }
  const auto combining = [](auto code) { return utf8proc_get_property(code)->combining_class; };
  for (auto run = codes.begin(); run != codes.end();) {  // a starter (class 0) and its marks
    const auto end = std::find_if(run + 1, codes.end(), [&](auto c) { return combining(c) == 0; });
    std::stable_sort(run, end, [&](auto a, auto b) { return combining(a) < combining(b); });
    run = end;
  }
  const auto how = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  codes.resize(utf8proc_normalize_utf32(codes.data(), codes.size(), how));
  std::string out;
  for (const auto code : codes) append_character(code, out);
  return out;
}

// Two ASCII characters side by side never interact: only one of them and the non-ASCII
// characters behind it are worked on.
inline std::string nfc(std::string_view text) {
  static const Regex segment("[\\x00-\\x7F]?+[^\\x00-\\x7F]++");
  std::string out;
  segment.for_each_part(text, [&](std::size_t begin, std::size_t end, bool is_match) {
    const std::string_view part = text.substr(begin, end - begin);
    out += is_match ? nfc_of_segment(part) : std::string(part);
  });
  return out;
}

// The pattern of GPT-2, which ByteLevel uses unless the file says otherwise.
constexpr const char* kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// Splits at the matches of a pattern, which become words of their own or go to a neighbour:
//     "a--b" at "-":  Isolated a - - b   Contiguous a -- b   Removed a b
//                     MergedWithPrevious a- - b              MergedWithNext a - -b
struct Split {
  Regex regex;
  std::string behavior;
  bool invert = false;  // exchanges matches and what is between them

  template <class OnPiece>
  void operator()(std::string_view text, OnPiece on_piece) const {
    const bool removed = behavior == "Removed", contiguous = behavior == "Contiguous";
    const bool previous = behavior == "MergedWithPrevious", next = behavior == "MergedWithNext";
    std::size_t begin = 0;                 // of the word that may still grow
    bool started = false, matched = true;  // whether it has begun, and whether its end is a match
    const auto flush = [&](std::size_t end) {
      if (begin < end && !(removed && matched)) on_piece(text.substr(begin, end - begin));
      begin = end;
    };
    regex.for_each_part(text, [&](std::size_t place, std::size_t, bool match) {
      match = match != invert;
      const bool joins = (contiguous && match == matched) || (previous && match && !matched) ||
                         (next && !match && matched);
      if (!started || !joins) flush(place);
      started = true;
      matched = match;
    });
    flush(text.size());
  }
};

// One step of a pre-tokenizer: cuts text into pieces, or changes it.
struct PreTokenizer {
  std::optional<Split> split;
  Change change;
};

// ==== From a word to tokens ============================================================

inline std::uint64_t pair_key(std::uint32_t first, std::uint32_t second) {
  return static_cast<std::uint64_t>(first) << 32 | second;
}

// What the file's `model` says.
struct Model {
  struct Merge {
    std::uint32_t rank;  // place in the list of merges
    Token id;            // of both tokens together
  };
  std::unordered_map<std::string, Token> vocab;
  std::unordered_map<std::uint64_t, Merge> merges;  // (left id, right id) -> merge
  std::vector<Token> byte_tokens;                   // byte -> id of <0x..>; empty: no byte fallback
  std::string unknown;         // stands for characters without a token; empty: they vanish
  bool fuse_unknown = false;   // one for a run of them
  bool ignore_merges = false;  // words that the vocabulary holds whole are taken whole

  Token id_or_none(const std::string& token) const {
    const auto found = vocab.find(token);
    return found == vocab.end() ? -1 : found->second;
  }

  const Merge* merge_or_null(Token left, Token right) const {
    const auto found = merges.find(pair_key(left, right));
    return found == merges.end() ? nullptr : &found->second;
  }
};

// Step 4 of the head of this file.
inline std::vector<Token> to_symbols(const Model& model, std::string_view word) {
  std::vector<Token> symbols;
  symbols.reserve(word.size());
  bool was_unknown = false;
  for (std::size_t i = 0, size = 0; i < word.size(); i += size) {
    size = character_at(word, i).size;
    const std::string character(word.substr(i, size));
    const Token id = model.id_or_none(character);
    const bool unknown = id < 0 && model.byte_tokens.empty();
    if (unknown && model.unknown.empty()) continue;
    if (id >= 0) {
      symbols.push_back(id);
    } else if (!unknown) {
      for (const char b : character) symbols.push_back(model.byte_tokens[std::uint8_t(b)]);
    } else if (!was_unknown || !model.fuse_unknown) {
      symbols.push_back(model.id_or_none(model.unknown));
      check(symbols.back() >= 0, "the vocabulary lacks the unk_token ", model.unknown);
    }
    was_unknown = unknown;
  }
  return symbols;
}

// Step 5, in O(n log n). A token stands at the index where it begins; behind it stands -1 for
// each symbol that went into it. The queue holds pairs as one number, rank and index of the left
// token: the best rank first, of equals the leftmost. (A deque grows without copying.)
inline void merge(const Model& model, std::vector<Token>& symbols) {
  std::priority_queue<std::uint64_t, std::deque<std::uint64_t>, std::greater<>> queue;
  const std::size_t n = symbols.size();
  const auto right_of = [&](std::size_t i) {
    while (++i < n && symbols[i] < 0) continue;
    return i;
  };
  const auto merge_at = [&](std::size_t i) {
    const std::size_t right = right_of(i);
    return right < n ? model.merge_or_null(symbols[i], symbols[right]) : nullptr;
  };
  const auto queue_pair = [&](std::size_t i) {
    if (const auto* merge = merge_at(i)) queue.push(pair_key(merge->rank, i));
  };
  check(n >> 32 == 0, "a word of 4 GiB or more");
  for (std::size_t i = 0; i < n; ++i) queue_pair(i);
  while (!queue.empty()) {
    const std::uint64_t next = queue.top();
    queue.pop();
    std::size_t i = next & 0xFFFFFFFF;
    const Model::Merge* merge = merge_at(i);
    if (merge == nullptr || merge->rank != next >> 32) continue;  // changed since it was queued
    symbols[right_of(i)] = -1;
    symbols[i] = merge->id;
    queue_pair(i);
    if (i == 0) continue;
    while (symbols[--i] < 0) continue;
    queue_pair(i);
  }
  symbols.erase(std::remove(symbols.begin(), symbols.end(), -1), symbols.end());
}

// Encodes words, and remembers short ones, for text repeats them.
class WordEncoder {
 public:
  explicit WordEncoder(const Model& model) : model_(model) {}

  void encode(std::string_view text, std::vector<Token>& ids) {
    const auto add = [&](const std::vector<Token>& made) {
      ids.insert(ids.end(), made.begin(), made.end());
    };
    if (text.size() > 64) return add(tokens_of(text));
    const std::string word(text);
    auto found = memory_.find(word);
    if (found == memory_.end()) {
      if (memory_.size() == 1 << 16) memory_.clear();
      found = memory_.emplace(word, tokens_of(word)).first;
    }
    add(found->second);
  }

 private:
  std::vector<Token> tokens_of(std::string_view word) const {
    const Token whole = model_.ignore_merges ? model_.id_or_none(std::string(word)) : -1;
    std::vector<Token> made = whole >= 0 ? std::vector{whole} : to_symbols(model_, word);
    merge(model_, made);
    return made;
  }

  const Model& model_;
  std::unordered_map<std::string, std::vector<Token>> memory_;
};

// ==== Added tokens =====================================================================

// White space and \w as the Rust library has them; \G is where the search begins.
inline const Regex kSpaces("\\G\\p{White_Space}*");
inline const Regex kLastSpaces("(?<!\\p{White_Space})\\p{White_Space}*+\\z");
constexpr const char* kWord = "[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}])";
inline const Regex kBehindNoWord(std::string("\\G(?<!") + kWord);
inline const Regex kBeforeNoWord(std::string("\\G(?!") + kWord);

struct AddedToken {
  Token id;
  bool single_word;  // only between characters that are not \w
  bool lstrip;       // swallows white space to its left
  bool rstrip;       // and to its right
  std::string pattern;
};

// Finds added tokens in text, leftmost first, of those the longest, by a trie of their bytes.
// For each byte of text it looks at no more bytes than the longest token has.
class AddedTokens {
 public:
  void add(const AddedToken& token) {
    check(token.pattern.size() <= 256, "longer than 256 bytes: ", token.pattern);
    std::uint32_t node = 0;
    for (const char c : token.pattern) {
      const auto next = static_cast<std::uint32_t>(token_at_.size());
      const auto [edge, is_new] = edges_.try_emplace(pair_key(node, std::uint8_t(c)), next);
      if (is_new) token_at_.push_back(nullptr);
      node = edge->second;
    }
    check(token_at_[node] == nullptr, "the same token again: ", token.pattern);
    token_at_[node] = std::make_shared<const AddedToken>(token);
    is_first_byte_[static_cast<std::uint8_t>(token.pattern.front())] = true;
  }

  // Hands over, in order, the added tokens in text and the pieces between them (the text, and
  // whether it stands at the start).
  template <class OnToken, class OnText>
  void split(std::string_view text, OnToken on_token, OnText on_text) const {
    std::size_t done = 0, spaces_end = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
      const AddedToken* token = longest_at(text, i);
      if (token == nullptr) continue;
      std::size_t begin = i, end = i + token->pattern.size();
      i = end - 1;  // the search goes on behind the token itself
      if (token->single_word && !(kBehindNoWord.find(text, begin) && kBeforeNoWord.find(text, end)))
        continue;
      if (token->lstrip) begin = std::max(begin, done);
      if (token->lstrip) begin = done + kLastSpaces.find(text.substr(done, begin - done))->first;
      if (token->rstrip) end = spaces_end = kSpaces.find(text, std::max(end, spaces_end))->second;
      if (done < begin) on_text(text.substr(done, begin - done), done == 0);
      if (begin < end) on_token(token->id);  // not if the token before it swallowed it
      done = end;
    }
    if (done < text.size()) on_text(text.substr(done), done == 0);
  }

 private:
  const AddedToken* longest_at(std::string_view text, std::size_t i) const {
    const AddedToken* longest = nullptr;
    if (!is_first_byte_[static_cast<std::uint8_t>(text[i])]) return longest;
    for (std::uint32_t node = 0; i < text.size(); ++i) {
      const auto edge = edges_.find(pair_key(node, std::uint8_t(text[i])));
      if (edge == edges_.end()) break;
      node = edge->second;
      if (token_at_[node] != nullptr) longest = token_at_[node].get();
    }
    return longest;
  }

  std::unordered_map<std::uint64_t, std::uint32_t> edges_;  // (node, byte) -> node; the root is 0
  std::vector<std::shared_ptr<const AddedToken>> token_at_ = {nullptr};  // node -> token, or null
  std::array<bool, 256> is_first_byte_{};
};

// ==== All that a file says =============================================================

// How tokens become text.
struct Decoder {
  std::vector<Change> changes;  // of each token
  std::string bytes;            // then ByteLevel or ByteFallback or nothing
  bool spaces = false;          // between tokens
  std::string strip;            // taken once from the start of the whole text
  int stage = 0;                // of the last step read
};

struct Rules {
  static constexpr Token kText = -1;

  Model model;
  std::vector<Change> normalizers;
  std::optional<Replace> at_start;  // of all text; before the pre-tokenizers
  std::vector<PreTokenizer> pre_tokenizers;
  Decoder decoder;
  std::vector<Token> prompt = {kText};  // what the post_processor makes of a text
  AddedTokens added_in_raw, added_in_normalized;
  std::unordered_map<std::string, Token> added_ids;
  std::unordered_set<Token> special;
  std::map<Token, std::string> texts;  // id -> token
  std::mutex mutex;                    // for words
  WordEncoder words{model};            // changes as it remembers words

  std::string normalize(std::string text) const {
    for (const Change& change : normalizers) text = change(text);
    return text;
  }

  template <class OnWord>
  void pre_tokenize(std::string_view text, std::size_t step, OnWord& on_word) const {
    if (text.empty()) return;
    if (step == pre_tokenizers.size()) return on_word(text);
    const auto& [split, change] = pre_tokenizers[step];
    if (!split) return pre_tokenize(change(text), step + 1, on_word);
    (*split)(text, [&](std::string_view piece) { pre_tokenize(piece, step + 1, on_word); });
  }
};

// ==== Reading tokenizer.json ===========================================================

using Json = nlohmann::json;

inline std::string kind_of(const Json& value) {
  return value.is_number() ? value.dump() : value.type_name();
}

// The member, or null where there is none.
inline const Json& member(const Json& object, const std::string& key) {
  static const Json null;
  check(object.is_object(), "expected object, found ", kind_of(object));
  const auto found = object.find(key);
  return found == object.end() ? null : *found;
}

// The member, which must be a bool, a string, a list (Json::array_t) or an object (object_t).
template <class T>
const T& get(const Json& object, const char* key) {
  const Json& value = member(object, key);
  const T* found = value.get_ptr<const T*>();
  check(found != nullptr, key, ": expected ", Json(T()).type_name(), ", found ", kind_of(value));
  return *found;
}

template <class T>
T get_or(const T& otherwise, const Json& object, const char* key) {
  return member(object, key).is_null() ? otherwise : get<T>(object, key);
}

// An id, or a count. Ids of published vocabularies stay below 2^18.
inline Token to_number(const Json& value, const char* name) {
  constexpr std::uint64_t most = (1 << 22) - 1;
  check(value.is_number_unsigned() && value.get<std::uint64_t>() <= most, name,
        ": expected a number from 0 to ", most, ", found ", kind_of(value));
  return value.get<Token>();
}

inline Regex get_pattern(const Json& object) {
  const Json& pattern = member(object, "pattern");
  if (!member(pattern, "String").is_null()) return Regex(get<std::string>(pattern, "String"), true);
  return file_pattern(get<std::string>(pattern, "Regex"));
}

inline void read_vocab(const Json& model, Rules& rules) {
  for (const auto& [token, value] : get<Json::object_t>(model, "vocab")) {
    const Token id = to_number(value, "id");
    check(rules.texts.emplace(id, token).second, "two tokens have the id ", id);
    rules.model.vocab.emplace(token, id);
  }
}

// Merges, each "a b" or ["a", "b"].
inline void read_merges(const Json& json, Model& model) {
  std::uint32_t rank = 0;
  for (const Json& merge : get<Json::array_t>(json, "merges")) {
    std::vector<std::string> pair;
    const bool is_line = merge.is_string();
    std::istringstream line(is_line ? merge.get<std::string>() : "");
    if (line.str().rfind("#version", 0) == 0) continue;
    for (std::string token; std::getline(line, token, ' ');) pair.push_back(token);
    for (std::size_t i = 0; merge.is_array() && i < merge.size() && merge[i].is_string(); ++i) {
      pair.push_back(merge[i]);
    }
    check(pair.size() == 2 && (is_line || merge.size() == 2), "expected two tokens, found ",
          is_line ? line.str() : kind_of(merge));
    for (const std::string& token : {pair[0], pair[1], pair[0] + pair[1]}) {
      check(model.vocab.count(token) != 0, "not in model.vocab: ", token);
    }
    const std::uint64_t key = pair_key(model.vocab.at(pair[0]), model.vocab.at(pair[1]));
    model.merges[key] = {rank++, model.vocab.at(pair[0] + pair[1])};
  }
}

inline void read_model(const Json& json, Rules& rules) {
  Model& model = rules.model;
  const auto type = get_or<std::string>("BPE", json, "type");
  check(type == "BPE", "only the type BPE is supported, found ", type);
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    check(get_or<std::string>("", json, key).empty(), key, " is not supported");
  }
  const Json& dropout = member(json, "dropout");
  check(dropout.is_null() || dropout == 0.0, "dropout is not supported");
  model.unknown = get_or<std::string>("", json, "unk_token");
  model.fuse_unknown = get_or(false, json, "fuse_unk");
  model.ignore_merges = get_or(false, json, "ignore_merges");
  at("vocab", [&] { read_vocab(json, rules); });
  at("merges", [&] { read_merges(json, model); });
  if (!get_or(false, json, "byte_fallback")) return;
  model.byte_tokens.resize(256);
  for (const auto& [token, byte] : kFallbackBytes) {
    model.byte_tokens[byte] = model.id_or_none(token);
    check(model.byte_tokens[byte] >= 0, "byte_fallback: not in model.vocab: ", token);
  }
}

inline void read_normalizer(const std::string& type, const Json& step, Rules& rules) {
  if (type == "NFC") return rules.normalizers.push_back(nfc);
  check(type == "Prepend" || type == "Replace", "not supported");
  if (type == "Replace") {
    rules.normalizers.push_back(Replace{get_pattern(step), get<std::string>(step, "content")});
  } else {  // before the first character: not to an empty text
    rules.normalizers.push_back(Replace{Regex("\\A(?!\\z)"), get<std::string>(step, "prepend")});
  }
}

// Writes spaces as ▁, with one more in front of all text or of every piece of it.
inline void read_metaspace(const Json& step, Rules& rules) {
  std::vector<PreTokenizer>& steps = rules.pre_tokenizers;
  const char* otherwise = get_or(true, step, "add_prefix_space") ? "always" : "never";
  const auto when = get_or<std::string>(otherwise, step, "prepend_scheme");
  check(get<std::string>(step, "replacement") == "▁", "only the replacement ▁ is supported");
  check(when == "always" || when == "never" || when == "first", "not supported: ", when);
  check(when != "first" || (steps.empty() && rules.normalizers.empty()),
        "prepend_scheme first is not supported behind other steps");
  if (when == "first") rules.at_start = Replace{Regex("\\A(?! |▁)"), "▁"};
  steps.push_back({{}, Replace{Regex(" ", true), "▁"}});
  if (when == "always") steps.push_back({{}, Replace{Regex("\\A(?!▁)"), "▁"}});
  if (get_or(true, step, "split")) steps.push_back({Split{Regex("▁", true), "MergedWithNext"}, {}});
}

inline void read_pre_tokenizer(const std::string& type, const Json& step, Rules& rules) {
  std::vector<PreTokenizer>& steps = rules.pre_tokenizers;
  if (type == "Metaspace") {
    read_metaspace(step, rules);
  } else if (type == "ByteLevel") {
    if (get<bool>(step, "add_prefix_space")) steps.push_back({{}, Replace{Regex("\\A(?! )"), " "}});
    if (get_or(true, step, "use_regex"))
      steps.push_back({Split{file_pattern(kGpt2Pattern), "Isolated"}, {}});
    steps.push_back({{}, [](auto text) { return kByteAlphabet.to_characters(text); }});
  } else if (type == "Split") {
    static const std::unordered_set<std::string> known = {"Isolated", "Removed", "Contiguous",
                                                          "MergedWithPrevious", "MergedWithNext"};
    const auto& behavior = get<std::string>(step, "behavior");
    check(known.count(behavior) != 0, "the behavior ", behavior, " is not supported");
    steps.push_back({Split{get_pattern(step), behavior, get<bool>(step, "invert")}, {}});
  } else {
    check(type == "Digits", "not supported");
    const Regex digits(get<bool>(step, "individual_digits") ? "\\p{N}" : "\\p{N}+");
    steps.push_back({Split{digits, "Isolated"}, {}});
  }
}

// Decoders in this order: changes of each token, bytes, Fuse (all tokens become one), Strip.
inline void read_decoder(const std::string& type, const Json& step, Rules& rules) {
  static const std::unordered_map<std::string, int> stages = {
      {"Replace", 0}, {"ByteLevel", 1}, {"ByteFallback", 1}, {"Fuse", 2}, {"Strip", 3}};
  check(stages.count(type) != 0, "not supported");
  Decoder& decoder = rules.decoder;
  const int stage = stages.at(type), before = std::exchange(decoder.stage, stage);
  check(stage > before || (stage == 0 && before == 0), "not supported at this place");
  if (type == "Replace") {
    decoder.changes.push_back(Replace{get_pattern(step), get<std::string>(step, "content")});
  } else if (type == "Strip") {
    check(before == 2, "only supported behind Fuse");
    check(member(step, "start") == 1 && member(step, "stop") == 0,
          "only supported once, at the start");
    decoder.strip = get<std::string>(step, "content");
  } else if (stage == 1) {
    decoder.bytes = type;
  }
}

// The tokens around the text of a prompt.
inline void read_post_processor(const std::string& type, const Json& step, Rules& rules) {
  if (type == "ByteLevel") return;  // it adds none
  check(type == "TemplateProcessing", "not supported");
  check(rules.prompt.size() == 1, "not supported behind another one");
  rules.prompt.clear();
  for (const Json& piece : get<Json::array_t>(step, "single")) {
    if (const Json& text = member(piece, "Sequence"); !text.is_null()) {
      check(get<std::string>(text, "id") == "A", "single: expected one Sequence, A");
      rules.prompt.push_back(Rules::kText);
      continue;
    }
    const auto& name = get<std::string>(member(piece, "SpecialToken"), "id");
    for (const Json& id : get<Json::array_t>(member(member(step, "special_tokens"), name), "ids")) {
      rules.prompt.push_back(to_number(id, "id"));
    }
  }
  const auto texts = std::count(rules.prompt.begin(), rules.prompt.end(), Rules::kText);
  check(texts == 1, "single: expected one Sequence, A");
}

// Reads a step, or one after the other those in a Sequence, which it lists as `members`. (By
// reference: to copy JSON that is nested without end takes stack without end.)
template <class Read>
void read_steps(const Json& step, const char* members, Read read, Rules& rules, int depth = 0) {
  if (step.is_null()) return;
  const auto& type = get<std::string>(step, "type");
  if (type != "Sequence") return at(type, [&] { read(type, step, rules); });
  check(depth < 16, "too many Sequences in each other");
  for (const Json& each : get<Json::array_t>(step, members)) {
    read_steps(each, members, read, rules, depth + 1);
  }
}

// The library takes the id from the vocabulary or else counts on from its end. A file with
// another id means one thing to the library and another to who wrote it.
inline void read_added_token(const Json& entry, Rules& rules, Token& next_id) {
  const Token id = to_number(member(entry, "id"), "id");
  const auto& content = get<std::string>(entry, "content");
  const bool normalized = get<bool>(entry, "normalized");
  const AddedToken token = {id, get<bool>(entry, "single_word"), get<bool>(entry, "lstrip"),
                            get<bool>(entry, "rstrip"),
                            normalized ? rules.normalize(content) : content};
  if (get<bool>(entry, "special")) rules.special.insert(id);
  if (content.empty()) return;
  const Token known = rules.model.id_or_none(content);
  const Token expected = known < 0 ? next_id++ : known;
  check(id == expected, "expected id ", expected, ", found ", id, ": ", content);
  check(!token.pattern.empty(), "nothing is left of it when normalized: ", content);
  check(rules.added_ids.emplace(content, id).second, "the same token again: ", content);
  (normalized ? rules.added_in_normalized : rules.added_in_raw).add(token);
  rules.texts[id] = token.pattern;
}

inline void read_rules(const Json& file, Rules& rules) {
  at("model", [&] { read_model(member(file, "model"), rules); });
  const auto section = [&](const char* name, const char* members, auto read) {
    at(name, [&] { read_steps(member(file, name), members, read, rules); });
  };
  section("normalizer", "normalizers", read_normalizer);
  section("pre_tokenizer", "pretokenizers", read_pre_tokenizer);
  section("decoder", "decoders", read_decoder);
  section("post_processor", "processors", read_post_processor);
  rules.decoder.spaces = member(file, "decoder").is_null();
  if (member(file, "added_tokens").is_null()) return;
  auto next_id = static_cast<Token>(rules.model.vocab.size());
  int entry = 0;
  for (const Json& token : get<Json::array_t>(file, "added_tokens")) {
    const std::string place = "added_tokens: entry " + std::to_string(++entry);
    at(place, [&] { read_added_token(token, rules, next_id); });
  }
}

// JSON, or an error that names what people find in its place.
inline Json parse(std::string_view text) {
  const std::size_t begin = std::min(text.find_first_not_of(" \t\r\n"), text.size());
  check(!text.empty(), "the file is empty");
  check(text.substr(begin, 1) != "<", "expected JSON, found a page of HTML or XML");
  check(text.rfind("version https://git-lfs", 0) != 0,
        "expected JSON, found a Git LFS pointer; `git lfs pull` fetches the file");
  try {
    return Json::parse(text.begin(), text.end());
  } catch (const Json::parse_error& error) {
    check(false, "expected JSON, found an error at byte ", error.byte, " of ", text.size());
  } catch (const Json::exception&) {
    check(false, "expected JSON, found a number that is too large");
  }
  return {};
}

}  // namespace bpe

// ==== Tokenizer ========================================================================

class Tokenizer {
 public:
  static Tokenizer from_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    if (file.peek() != std::ifstream::traits_type::eof()) text << file.rdbuf();
    bpe::check(file.is_open() && !file.bad() && text, "tokenizer: ", path, ": cannot be read");
    return from_text(text.str(), path);
  }

  // The same from the text of a tokenizer.json; name stands for the path in messages.
  static Tokenizer from_text(std::string_view text, const std::string& name) {
    Tokenizer tokenizer;
    bpe::at("tokenizer: " + name, [&] { bpe::read_rules(bpe::parse(text), *tokenizer.rules_); });
    return tokenizer;
  }

  // The ids of the text alone. Bytes that are not UTF-8 count as U+FFFD. Where threads share a
  // tokenizer, one waits for the other.
  std::vector<Token> encode(std::string_view bytes) const {
    std::vector<Token> ids;
    std::string text;
    bpe::append_bytes(bytes, false, text);
    const std::lock_guard<std::mutex> lock(rules_->mutex);
    const auto on_token = [&](Token id) { ids.push_back(id); };
    const auto on_word = [&](std::string_view word) { rules_->words.encode(word, ids); };
    rules_->added_in_raw.split(text, on_token, [&](std::string_view piece, bool first) {
      const std::string normal = rules_->normalize(std::string(piece));
      rules_->added_in_normalized.split(normal, on_token, [&](std::string_view part, bool start) {
        if (!first || !start || !rules_->at_start) return rules_->pre_tokenize(part, 0, on_word);
        rules_->pre_tokenize((*rules_->at_start)(part), 0, on_word);
      });
    });
    return ids;
  }

  // With the tokens that the file's post_processor puts around a prompt.
  std::vector<Token> encode_prompt(std::string_view text) const {
    std::vector<Token> ids = rules_->prompt;
    const auto place = ids.erase(std::find(ids.begin(), ids.end(), bpe::Rules::kText));
    const std::vector<Token> made = encode(text);
    ids.insert(place, made.begin(), made.end());
    return ids;
  }

  // Ids that the file does not know are passed over: padded vocabularies have such.
  std::string decode(const std::vector<Token>& ids, bool skip_special_tokens = false) const;

  // The id of a token by its text in the file, for example "<|endoftext|>".
  std::optional<Token> id_of(const std::string& text) const {
    const auto added = rules_->added_ids.find(text);
    const bool is_added = added != rules_->added_ids.end();
    const Token id = is_added ? added->second : rules_->model.id_or_none(text);
    return id < 0 ? std::nullopt : std::optional<Token>(id);
  }

  // A token's text in the file; nothing where no token has this id.
  std::optional<std::string> text_of(Token id) const {
    const auto found = rules_->texts.find(id);
    return found == rules_->texts.end() ? std::nullopt : std::optional(found->second);
  }

  // All ids are smaller than this; there may be ids below it without a token.
  std::size_t vocab_size() const {
    return rules_->texts.empty() ? 0 : rules_->texts.rbegin()->first + 1;
  }

 private:
  friend class StreamDecoder;
  std::unique_ptr<bpe::Rules> rules_ = std::make_unique<bpe::Rules>();
};

// ==== StreamDecoder ====================================================================

// Text as it is made. What push() and finish() return, put together, is what decode() returns:
// a character whose bytes come in several tokens is held back until it is whole, and bytes of
// byte fallback until another token shows that no more of them follow.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special_tokens = false)
      : tokenizer_(tokenizer),
        decoder_(tokenizer.rules_->decoder),
        skip_special_tokens_(skip_special_tokens) {}

  std::string push(Token id) {
    std::optional<std::string> token = tokenizer_.text_of(id);
    if (!token || (skip_special_tokens_ && tokenizer_.rules_->special.count(id) != 0)) return "";
    for (const bpe::Change& change : decoder_.changes) token = change(*token);
    if (decoder_.bytes == "ByteLevel") {
      pending_ += bpe::kByteAlphabet.to_bytes(*token);
      std::string text;
      pending_.erase(0, bpe::append_bytes(pending_, true, text));
      return stripped(text);
    }
    if (decoder_.bytes == "ByteFallback" && bpe::kFallbackBytes.count(*token) != 0) {
      pending_ += static_cast<char>(bpe::kFallbackBytes.at(*token));
      return "";
    }
    const bool space = decoder_.spaces && !std::exchange(first_, false);
    const std::string held_back = finish();
    return held_back + stripped((space ? " " : "") + *token);
  }

  // What was held back. Bytes of byte fallback are text together or, each, U+FFFD.
  std::string finish() {
    std::string text;
    const std::string bytes = std::exchange(pending_, {});
    bpe::append_bytes(bytes, false, text);
    if (decoder_.bytes == "ByteFallback" && text != bytes) {
      text.clear();
      for (std::size_t i = 0; i < bytes.size(); ++i) text += bpe::kReplacement;
    }
    return stripped(text);
  }

 private:
  std::string stripped(std::string text) {
    const std::string& strip = decoder_.strip;
    const bool at_start = !text.empty() && !std::exchange(begun_, true);
    return at_start && text.rfind(strip, 0) == 0 ? text.substr(strip.size()) : text;
  }

  const Tokenizer& tokenizer_;
  const bpe::Decoder& decoder_;
  bool skip_special_tokens_;
  bool first_ = true;    // no token has come yet
  bool begun_ = false;   // text has come
  std::string pending_;  // bytes
};

inline std::string Tokenizer::decode(const std::vector<Token>& ids,
                                     bool skip_special_tokens) const {
  StreamDecoder decoder(*this, skip_special_tokens);
  std::string text;
  for (const Token id : ids) text += decoder.push(id);
  return text + decoder.finish();
}

}  // namespace mamba
