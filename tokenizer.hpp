// tokenizer.hpp: text to token ids and back.
//
// Reads a Hugging Face `tokenizer.json` that holds a byte-pair encoding (BPE), of bytes as in
// GPT-2, GPT-NeoX and all state-spaces Mamba models, or of characters with bytes to fall back
// on as in Llama and Codestral, and gives the ids and texts that the Rust library `tokenizers`
// gives. Needs nlohmann/json, PCRE2 and utf8proc.
//
//     Tokenizer tokenizer = Tokenizer::from_file("weights/stories/tokenizer.json");
//     std::vector<Token> ids = tokenizer.encode("Once upon a time");
//     std::string text = tokenizer.decode(ids);
//
// Encoding takes five steps:
//
//   1. Added tokens such as <|endoftext|> are cut out of the text; each is one id.
//   2. The rest is normalized, for example to Unicode normal form C: e + U+0301 becomes U+00E9.
//   3. It is split into words by the file's own pattern; a space goes with the word behind it:
//          "low lower" -> "low" " lower"
//   4. Every character of a word becomes a token. Byte-level files first write each byte as one
//      visible character, the space as Ġ, so that nothing is unknown; byte fallback spells a
//      character that has no token as <0xE2><0x9C><0x93>.
//   5. The pair of neighbours that comes first in the list of merges becomes one token, the
//      leftmost if it occurs twice; again, until no neighbours are in the list:
//          merges:  0 "e r"   1 "l o"   2 "lo w"   3 "Ġ low"
//          Ġ l o w e r -0-> Ġ l o w er -1-> Ġ lo w er -2-> Ġ low er   (-3-> Ġlow er)
//
// Decoding undoes steps 4 and 2 token by token and joins the bytes; only then are they text.
//
// Left out are `truncation` and `padding`. Anything else that a file asks for and that is not
// done here is an error.
#pragma once

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
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

// =======================================================================================
// UTF-8
// =======================================================================================

constexpr const char* kReplacement = "\xEF\xBF\xBD";  // U+FFFD, in place of what is not UTF-8

// What stands at one place of a byte string: a character, or, if it is not valid, the bytes
// that become one U+FFFD: as many as begin a character before it breaks off.
struct Character {
  char32_t code;
  std::size_t size;
  bool valid;
  bool cut_off;  // not valid only because the string ends
};

inline Character character_at(std::string_view text, std::size_t i) {
  const auto byte = [&](std::size_t k) { return static_cast<std::uint8_t>(text[i + k]); };
  const std::uint8_t lead = byte(0);
  if (lead < 0x80) return {lead, 1, true, false};
  if (lead < 0xC2 || lead > 0xF4) return {0, 1, false, false};
  const std::size_t size = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  // No overlong forms (E0, F0), no surrogates (ED), nothing above U+10FFFF (F4).
  std::uint8_t low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  std::uint8_t high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  char32_t code = lead & (0x7Fu >> size);
  for (std::size_t k = 1; k < size; ++k) {
    if (i + k == text.size()) return {0, k, false, true};
    if (byte(k) < low || byte(k) > high) return {0, k, false, false};
    code = code << 6 | (byte(k) & 0x3Fu);
    low = 0x80, high = 0xBF;
  }
  return {code, size, true, false};
}

// The character that ends at i > 0, in valid text.
inline std::string_view character_before(std::string_view text, std::size_t i) {
  std::size_t begin = i - 1;
  while (begin > 0 && (text[begin] & 0xC0) == 0x80) --begin;
  return text.substr(begin, i - begin);
}

// Where the ASCII characters that start at i end.
inline std::size_t ascii_end(std::string_view text, std::size_t i) {
  while (i < text.size() && static_cast<std::uint8_t>(text[i]) < 0x80) ++i;
  return i;
}

inline void append_character(char32_t code, std::string& text) {
  std::array<utf8proc_uint8_t, 4> bytes{};
  const auto size = utf8proc_encode_char(static_cast<utf8proc_int32_t>(code), bytes.data());
  text.append(bytes.begin(), bytes.begin() + size);
}

// Appends bytes to text, with U+FFFD for what is not UTF-8. Returns where it stopped: at
// the end, or, with keep_cut_off, at a character whose other bytes may still come.
inline std::size_t append_bytes(std::string_view bytes, bool keep_cut_off, std::string& text) {
  for (std::size_t i = 0; i < bytes.size();) {
    const Character c = character_at(bytes, i);
    if (c.cut_off && keep_cut_off) return i;
    text += c.valid ? bytes.substr(i, c.size) : std::string_view(kReplacement);
    i += c.size;
  }
  return bytes.size();
}

// The byte alphabet. Bytes that are visible in Latin-1 stand for themselves; the other 68, in
// order, are U+0100 to U+0143, so that the space (0x20) is U+0120, Ġ.
struct ByteAlphabet {
  std::array<std::string, 256> character;  // byte -> character, as UTF-8
  std::array<int, 0x144> byte{};           // code point -> byte, or -1

  ByteAlphabet() {
    byte.fill(-1);
    char32_t next = 0x100;
    for (char32_t b = 0; b < 256; ++b) {
      const bool visible = (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD);
      const char32_t code = visible ? b : next++;
      append_character(code, character[b]);
      byte[code] = static_cast<int>(b);
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
    for (std::size_t i = 0; i < token.size();) {
      const Character c = character_at(token, i);
      if (c.code >= byte.size() || byte[c.code] < 0) return token;
      bytes += static_cast<char>(byte[c.code]);
      i += c.size;
    }
    return bytes;
  }
};

inline const ByteAlphabet& byte_alphabet() {
  static const ByteAlphabet alphabet;
  return alphabet;
}

// =======================================================================================
// Patterns
// =======================================================================================

// Files write patterns in the syntax of Oniguruma. Where PCRE2 would read the same text
// differently, it is rewritten (\s, \S, \w) or refused.
inline std::string to_pcre2(std::string_view pattern) {
  std::string out;
  bool in_set = false;  // [...]
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    const auto next = [&](std::string_view text) { return pattern.substr(i, text.size()) == text; };
    const char before = i > 0 ? pattern[i - 1] : ' ';
    const bool repeats = next("}+") && ((before >= '0' && before <= '9') || before == ',');
    bool refused =
        in_set ? next("[") || next("&&") : repeats || next("{,") || next("(?m") || next("(*");
    if (next("[") || next("]")) in_set = next("[");
    if (next("\\s") || next("\\S")) {
      (out += next("\\s") ? R"(\p)" : R"(\P)") += "{White_Space}";
    } else if (next("\\w")) {
      ((out += in_set ? "" : "[") += R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc})") += in_set ? "" : "]";
    } else if (next("\\") && i + 1 < pattern.size()) {
      const auto letter = static_cast<unsigned char>(pattern[i + 1]);
      refused = std::isalnum(letter) && std::string_view("dDpPrntxAz").find(letter) == pattern.npos;
      out += pattern.substr(i, 2);
    } else {
      out += pattern[i];
    }
    check(!refused, "the pattern has ", pattern.substr(i, 2), ", which is not supported");
    if (next("\\")) ++i;
  }
  return out;
}

// A pattern of PCRE2, or a text to be found as it is. Work and memory of one search are bounded.
class Regex {
 public:
  explicit Regex(const std::string& pattern, bool literal = false) {
    const std::uint32_t regex = PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C;
    const std::uint32_t options = PCRE2_UTF | (literal ? PCRE2_LITERAL : regex);
    int error = 0;
    PCRE2_SIZE at = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), options,
                              &error, &at, nullptr),
                pcre2_code_free);
    std::array<PCRE2_UCHAR, 256> why{};
    if (!code_) pcre2_get_error_message(error, why.data(), why.size());
    check(code_ != nullptr, "the pattern is wrong at byte ", at, ": ", why.data());
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);  // where there is no JIT: slower
  }

  // Calls on_part(begin, end, is_match) for the matches and for what is between them, in order.
  template <class OnPart>
  void for_each_part(std::string_view text, OnPart on_part) const {
    const std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)> data(
        pcre2_match_data_create(1, nullptr), pcre2_match_data_free);
    const PCRE2_SIZE* match = pcre2_get_ovector_pointer(data.get());
    std::size_t done = 0;
    bool matched = false;
    for (std::size_t from = 0; from <= text.size() && search(text, from, data.get());) {
      if (matched && match[0] == match[1] && match[1] == done) {  // no empty match behind a match
        from += from < text.size() ? character_at(text, from).size : 1;
        continue;
      }
      if (done < match[0]) on_part(done, match[0], false);
      on_part(match[0], match[1], true);
      matched = true;
      done = from = match[1];
    }
    if (done < text.size()) on_part(done, text.size(), false);
  }

  bool matches(std::string_view text) const {
    bool found = false;
    for_each_part(text, [&](std::size_t, std::size_t, bool is_match) { found |= is_match; });
    return found;
  }

 private:
  bool search(std::string_view text, std::size_t from, pcre2_match_data* data) const {
    const auto run = [&](std::uint32_t options) {
      return pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                         options, data, limits());
    };
    int result = run(PCRE2_NO_UTF_CHECK);
    if (result == PCRE2_ERROR_JIT_STACKLIMIT) result = run(PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT);
    check(result >= 0 || result == PCRE2_ERROR_NOMATCH,
          "a pattern of the tokenizer's file takes too much time or memory on this text");
    return result >= 0;
  }

  static pcre2_match_context* limits() {
    static const std::shared_ptr<pcre2_match_context> context = [] {
      std::shared_ptr<pcre2_match_context> made(pcre2_match_context_create(nullptr),
                                                pcre2_match_context_free);
      pcre2_set_match_limit(made.get(), 100'000'000);  // steps
      pcre2_set_heap_limit(made.get(), 64 << 10);      // KiB
      return made;
    }();
    return context.get();
  }

  std::shared_ptr<pcre2_code> code_;
};

inline bool is_space(std::string_view character) {
  static const Regex space(R"(\p{White_Space})");
  return space.matches(character);
}

inline bool is_word(std::string_view character) {
  static const Regex word(R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}])");
  return word.matches(character);
}

// =======================================================================================
// Changing text before and after
// =======================================================================================

// Puts content in place of every match. `first` says that text is the start of all text, which
// for_first may be for; it becomes false if the start is removed.
struct Replacement {
  Regex regex;
  std::string content, for_first = content;

  std::string operator()(std::string_view text, bool& first) const {
    std::string out;
    const std::string& in_place = first ? for_first : content;
    if (text.empty()) return out;
    regex.for_each_part(text, [&](std::size_t begin, std::size_t end, bool is_match) {
      out += is_match ? in_place : text.substr(begin, end - begin);
      if (is_match && in_place.empty() && begin == 0 && end > 0) first = false;
      check(out.size() < 1 << 30, "replacing makes a text of 1 GiB or more");
    });
    return out;
  }
};
using TextStep = std::function<std::string(std::string_view text, bool& first)>;

// Decompose, sort marks by combining class, compose. (Some hundred marks are younger than
// the Rust library's tables, Unicode 10; it leaves them where they stand.)
inline void append_normal_form(std::string_view segment, int options, std::string& out) {
  std::vector<utf8proc_int32_t> codes;
  std::array<utf8proc_int32_t, 32> parts{};  // the longest decomposition has 18
  for (std::size_t i = 0; i < segment.size();) {
    const Character c = character_at(segment, i);
    const auto how = static_cast<utf8proc_option_t>(options | UTF8PROC_DECOMPOSE);
    const auto count = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c.code), parts.data(),
                                               parts.size(), how, nullptr);
    codes.insert(codes.end(), parts.begin(), parts.begin() + count);
    i += c.size;
  }
  // Sorted here, because utf8proc takes quadratic time on a long run of marks.
  const auto combining = [](auto c) { return utf8proc_get_property(c)->combining_class; };
  const auto is_starter = [&](auto c) { return combining(c) == 0; };
  for (auto run = codes.begin(); run != codes.end();) {
    run = std::find_if_not(run, codes.end(), is_starter);
    const auto end = std::find_if(run, codes.end(), is_starter);
    std::stable_sort(run, end, [&](auto a, auto b) { return combining(a) < combining(b); });
    run = end;
  }
  if ((options & UTF8PROC_COMPOSE) != 0) {
    const auto how = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    const auto size = static_cast<utf8proc_ssize_t>(codes.size());
    codes.resize(static_cast<std::size_t>(utf8proc_normalize_utf32(codes.data(), size, how)));
  }
  for (const auto code : codes) append_character(static_cast<char32_t>(code), out);
}

// Normal form C, D, KC or KD. Two ASCII characters side by side never interact: only segments
// of one ASCII character and the non-ASCII ones behind it are worked on.
inline std::string normal_form(std::string_view text, int options) {
  std::string out;
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t ascii = ascii_end(text, i);
    const std::size_t begin = ascii > i && ascii < text.size() ? ascii - 1 : ascii;
    out += text.substr(i, begin - i);
    for (i = ascii; i < text.size() && static_cast<std::uint8_t>(text[i]) >= 0x80;) ++i;
    append_normal_form(text.substr(begin, i - begin), options, out);
  }
  return out;
}

// =======================================================================================
// Splitting text into words
// =======================================================================================

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

  // Calls on_piece(piece, first), where `first` still says that it is the start of all text.
  template <class OnPiece>
  void operator()(std::string_view text, bool first, OnPiece on_piece) const {
    const bool removed = behavior == "Removed", contiguous = behavior == "Contiguous";
    const bool previous = behavior == "MergedWithPrevious", next = behavior == "MergedWithNext";
    std::size_t begin = 0;                 // of the word that may still grow
    bool started = false, matched = true;  // whether it has begun, and whether its end is a match
    const auto flush = [&](std::size_t end) {
      if (begin < end && !(removed && matched)) {
        on_piece(text.substr(begin, end - begin), first && begin == 0);
      }
      begin = end;
    };
    regex.for_each_part(text, [&](std::size_t at, std::size_t, bool match) {
      match = match != invert;
      const bool joins = (contiguous && match == matched) || (previous && match && !matched) ||
                         (next && !match && matched);
      if (!started || !joins) flush(at);
      started = true;
      matched = match;
    });
    flush(text.size());
  }
};

// A step before the words: cuts text into pieces, or changes it.
struct PreTokenizer {
  std::optional<Split> split;
  TextStep change;
};

// =======================================================================================
// Byte-pair encoding of one word
// =======================================================================================

// What the file's `model` says.
struct Model {
  struct Merge {
    std::uint32_t rank;  // place in the list of merges
    Token id;            // of both tokens together
  };
  std::unordered_map<std::string, Token> vocab;
  std::unordered_map<std::uint64_t, Merge> merges;  // (left id, right id) -> merge
  std::array<Token, 256> byte_token{};              // byte -> id of <0x..>, or -1
  std::string unknown;        // stands for characters without a token; empty: they vanish
  bool fuse_unknown = false;  // one for a run of them
  bool byte_fallback = false;
  bool ignore_merges = false;  // words that the vocabulary holds whole are taken whole

  static std::uint64_t key(Token left, Token right) {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 |
           static_cast<std::uint32_t>(right);
  }

  Token id_or_none(const std::string& token) const {
    const auto found = vocab.find(token);
    return found == vocab.end() ? -1 : found->second;
  }
};

// Encodes words, and remembers them, for text repeats them.
class WordEncoder {
 public:
  explicit WordEncoder(const Model& model, std::size_t window = 1 << 12)
      : model_(model), window_(window) {}

  void encode(std::string_view word, std::vector<Token>& ids) {
    if (word.size() > kLongestRemembered) return encode_new(std::string(word), ids);
    const auto found = memory_.find(std::string(word));
    if (found != memory_.end()) {
      ids.insert(ids.end(), found->second.begin(), found->second.end());
      return;
    }
    if (memory_.size() == kRemembered) memory_.clear();
    std::vector<Token> made;
    encode_new(std::string(word), made);
    ids.insert(ids.end(), made.begin(), made.end());
    memory_.emplace(word, std::move(made));
  }

 private:
  static constexpr std::size_t kLongestRemembered = 64, kRemembered = 1 << 16;
  static constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

  struct Symbol {  // a token of the word, at the index where it begins
    Token id;
    std::uint32_t rank;         // of the pair that it makes with its right neighbour
    std::uint32_t left, right;  // neighbours: indices in symbols_
  };
  using Placed = std::pair<Token, std::size_t>;  // a token, the character with which it begins

  void encode_new(const std::string& word, std::vector<Token>& ids) {
    const Token whole = model_.ignore_merges ? model_.id_or_none(word) : -1;
    if (whole >= 0) return ids.push_back(whole);
    to_characters(word);
    const std::size_t before = ids.size();
    for (std::size_t window = window_; !merge_by_windows(window, ids); window *= 2) {
      ids.resize(before);  // tokens are too long for it
    }
  }

  // Step 4 of the head of this file.
  void to_characters(std::string_view word) {
    characters_.clear();
    bool unknown = false;  // one is still to be written
    std::array<Token, 4> bytes{};
    for (std::size_t i = 0, size = 0; i < word.size(); i += size) {
      size = character_at(word, i).size;
      const Token id = model_.id_or_none(std::string(word.substr(i, size)));
      bool spelled = id < 0 && model_.byte_fallback;
      for (std::size_t b = 0; spelled && b < size; ++b) {
        bytes[b] = model_.byte_token[static_cast<std::uint8_t>(word[i + b])];
        spelled = bytes[b] >= 0;
      }
      if (spelled) {
        characters_.insert(characters_.end(), bytes.begin(), bytes.begin() + size);
      } else if (id >= 0 || !model_.unknown.empty()) {
        if (unknown && (id >= 0 || !model_.fuse_unknown)) add_unknown();
        if (id >= 0) characters_.push_back(id);
        unknown = id < 0;
      }
    }
    if (unknown) add_unknown();
  }

  void add_unknown() {
    characters_.push_back(model_.id_or_none(model_.unknown));
    check(characters_.back() >= 0, "the vocabulary lacks the unk_token ", model_.unknown);
  }

  // Encodes a long word in pieces, so that memory does not grow with it. Tokens stand in the
  // encoding of the whole just when all neighbours among them stand (encoding the characters of
  // both gives them again): the first merge across a border would happen in a pair alone as well.
  // So a window can be left at any token that stands beside the first of the next window.
  bool merge_by_windows(std::size_t window, std::vector<Token>& ids) {
    const std::size_t end = characters_.size();
    std::vector<Placed> tokens = merge(0, std::min(end, window)), next;
    for (std::size_t border = 0; end - border > window; tokens.swap(next)) {
      bool stands = false;
      std::size_t kept = tokens.size() - tokens.size() / 8;
      for (int tries = 8; !stands && tries > 0 && --kept > 0; --tries) {
        border = tokens[kept].second;
        const std::size_t stop = std::min(end, border + window);
        next = merge(border, stop);
        const auto pair = merge(tokens[kept - 1].second, next.size() > 1 ? next[1].second : stop);
        stands = pair == std::vector<Placed>{tokens[kept - 1], next[0]};
      }
      if (!stands) return false;
      for (std::size_t i = 0; i < kept; ++i) ids.push_back(tokens[i].first);
    }
    for (const Placed& token : tokens) ids.push_back(token.first);
    return true;
  }

  // Step 5, in O(n log n): a queue holds the pairs, best rank first, then leftmost; one that
  // has changed since it was queued is passed over.
  std::vector<Placed> merge(std::size_t begin, std::size_t end) {
    check(end - begin < kNone, "a word of 4 GiB or more");
    const auto n = static_cast<std::uint32_t>(end - begin);
    symbols_.resize(n);
    queue_.clear();
    for (std::uint32_t i = 0; i < n; ++i) {
      symbols_[i] = {characters_[begin + i], kNone, i == 0 ? kNone : i - 1,
                     i + 1 == n ? kNone : i + 1};
    }
    for (std::uint32_t i = 0; i < n; ++i) queue_pair(i);
    while (!queue_.empty()) {
      std::pop_heap(queue_.begin(), queue_.end(), std::greater<>());
      const auto [rank, i] = queue_.back();
      queue_.pop_back();
      if (symbols_[i].rank == rank) merge_pair(i);
    }
    std::vector<Placed> tokens;
    for (std::uint32_t i = n == 0 ? kNone : 0; i != kNone; i = symbols_[i].right) {
      tokens.emplace_back(symbols_[i].id, begin + i);
    }
    return tokens;
  }

  void merge_pair(std::uint32_t i) {
    Symbol &left = symbols_[i], &right = symbols_[left.right];
    left.id = model_.merges.at(Model::key(left.id, right.id)).id;
    left.right = right.right;
    if (right.right != kNone) symbols_[right.right].left = i;
    right.rank = kNone;  // gone, and its pair with it
    queue_pair(i);
    if (left.left != kNone) queue_pair(left.left);
  }

  // Looks up the pair that symbol i makes with its right neighbour and queues it.
  void queue_pair(std::uint32_t i) {
    Symbol& symbol = symbols_[i];
    symbol.rank = kNone;
    if (symbol.right == kNone) return;
    const auto found = model_.merges.find(Model::key(symbol.id, symbols_[symbol.right].id));
    if (found == model_.merges.end()) return;
    symbol.rank = found->second.rank;
    queue_.emplace_back(symbol.rank, i);
    std::push_heap(queue_.begin(), queue_.end(), std::greater<>());
  }

  const Model& model_;
  std::size_t window_;
  std::unordered_map<std::string, std::vector<Token>> memory_;
  std::vector<Token> characters_;  // of the word
  std::vector<Symbol> symbols_;
  std::vector<std::pair<std::uint32_t, std::uint32_t>> queue_;  // (rank, index of the left symbol)
};

// =======================================================================================
// Added tokens
// =======================================================================================

struct AddedToken {
  Token id;
  bool single_word;  // only between characters that are not \w
  bool lstrip;       // swallows white space to its left
  bool rstrip;       // and to its right
  std::string pattern;
};

// Finds added tokens in text: leftmost first, of those the longest. In time that grows with the
// text alone: an Aho-Corasick automaton reads it from its end, and so knows at every place the
// longest token that begins there.
class AddedTokens {
 public:
  void add(const AddedToken& token) {
    std::uint32_t node = 0;
    for (auto c = token.pattern.rbegin(); c != token.pattern.rend(); ++c) {
      const auto next = static_cast<std::uint32_t>(nodes_.size());
      const auto [edge, is_new] = edges_.try_emplace(key(node, *c), next);
      if (is_new) nodes_.push_back({node, nodes_[node].depth + 1, *c});
      node = edge->second;
    }
    check(nodes_[node].token < 0, "the same token again: ", token.pattern);
    is_last_byte_[static_cast<std::uint8_t>(token.pattern.back())] = true;
    nodes_[node].token = static_cast<std::int32_t>(tokens_.size());
    tokens_.push_back(token);
  }

  // To be called when all are added.
  void build() {
    std::vector<std::uint32_t> order(nodes_.size());
    std::iota(order.begin(), order.end(), 0);
    const auto is_above = [&](auto a, auto b) { return nodes_[a].depth < nodes_[b].depth; };
    std::stable_sort(order.begin(), order.end(), is_above);
    for (const std::uint32_t v : order) {
      Node& node = nodes_[v];
      node.shorter = node.depth < 2 ? 0 : next(nodes_[node.parent].shorter, node.byte);
      if (node.token < 0) node.token = nodes_[node.shorter].token;
    }
  }

  // Hands over, in order, the added tokens in text and the pieces between them.
  template <class OnToken, class OnText>
  void split(std::string_view text, OnToken on_token, OnText on_text) const {
    std::size_t done = 0, after = 0, spaces_end = 0;
    const std::vector<Match> matches = longest_from_each_place(text);
    for (auto match = matches.rbegin(); match != matches.rend(); ++match) {
      if (match->begin < after) continue;
      const AddedToken& token = tokens_[match->token];
      std::size_t begin = match->begin, end = begin + token.pattern.size();
      after = end;
      if (token.single_word && !stands_alone(text, begin, end)) continue;
      while (token.lstrip && begin > done && is_space(character_before(text, begin))) {
        begin -= character_before(text, begin).size();
      }
      if (token.lstrip) begin = std::max(begin, done);
      if (token.rstrip) end = spaces_end = after_spaces(text, std::max(end, spaces_end));
      if (done < begin) on_text(text.substr(done, begin - done), done == 0);
      if (begin < end) on_token(token.id);  // not if the token before it swallowed it
      done = end;
    }
    if (done < text.size()) on_text(text.substr(done), done == 0);
  }

 private:
  struct Node {  // of a trie of the tokens, each written backwards
    std::uint32_t parent, depth;
    char byte;                  // that leads to it from its parent
    std::uint32_t shorter = 0;  // the longest other node that its string ends with
    std::int32_t token = -1;    // the longest that its string ends with: index in tokens_
  };
  struct Match {
    std::uint32_t begin, token;
  };

  static std::size_t after_spaces(std::string_view text, std::size_t i) {
    for (std::size_t size = 0; i < text.size(); i += size) {
      size = character_at(text, i).size;
      if (!is_space(text.substr(i, size))) break;
    }
    return i;
  }

  static bool stands_alone(std::string_view text, std::size_t begin, std::size_t end) {
    return (begin == 0 || !is_word(character_before(text, begin))) &&
           (end == text.size() || !is_word(text.substr(end, character_at(text, end).size)));
  }

  static std::uint64_t key(std::uint32_t node, char c) {
    return static_cast<std::uint64_t>(node) << 8 | static_cast<std::uint8_t>(c);
  }

  std::uint32_t next(std::uint32_t node, char c) const {
    for (;; node = nodes_[node].shorter) {
      const auto edge = edges_.find(key(node, c));
      if (edge != edges_.end()) return edge->second;
      if (node == 0) return 0;
    }
  }

  std::vector<Match> longest_from_each_place(std::string_view text) const {
    std::vector<Match> matches;
    if (tokens_.empty()) return matches;
    check(text.size() < std::numeric_limits<std::uint32_t>::max(), "a text of 4 GiB or more");
    std::uint32_t node = 0;
    for (auto i = static_cast<std::uint32_t>(text.size()); i-- > 0;) {
      if (node == 0 && !is_last_byte_[static_cast<std::uint8_t>(text[i])]) continue;
      node = next(node, text[i]);
      const std::int32_t token = nodes_[node].token;
      if (token >= 0) matches.push_back({i, static_cast<std::uint32_t>(token)});
    }
    return matches;
  }

  std::vector<AddedToken> tokens_;
  std::vector<Node> nodes_ = {{0, 0, '\0'}};
  std::unordered_map<std::uint64_t, std::uint32_t> edges_;  // (node, byte) -> node; the root is 0
  std::array<bool, 256> is_last_byte_{};
};

// =======================================================================================
// Decoders
// =======================================================================================

// Removes up to `most` times `content` from the start of text; returns how many are left to do.
inline std::size_t strip_start(std::string& text, const std::string& content, std::size_t most) {
  std::size_t end = 0;
  for (; most > 0 && text.compare(end, content.size(), content) == 0; --most) end += content.size();
  text.erase(0, end);
  return text.empty() ? most : 0;
}

// How tokens become text: `before` and `after` change each token, bytes come between.
struct Decoder {
  enum class Bytes { None, Alphabet, Fallback };

  std::vector<Replacement> before, after;
  Bytes bytes = Bytes::None;
  bool spaces = false;          // between tokens
  bool fused = false;           // all tokens are one text from here on
  std::string strip_content;    // taken from the start of the whole text
  std::size_t strip_count = 0;  // at most so often
};

// The byte that <0xE2> stands for, or -1.
inline int fallback_byte(const std::string& token) {
  if (token.size() != 6 || token.compare(0, 3, "<0x") != 0 || token[5] != '>') return -1;
  const auto is_hex = [](char c) { return std::isxdigit(static_cast<unsigned char>(c)) != 0; };
  return is_hex(token[3]) && is_hex(token[4]) ? std::stoi(token.substr(3, 2), nullptr, 16) : -1;
}

// =======================================================================================
// Reading tokenizer.json
// =======================================================================================

using Json = nlohmann::json;

inline std::string kind_of(const Json& value) {
  return value.is_number() ? value.dump() : value.type_name();
}

// The member, or null where there is none.
inline const Json& member(const Json& object, const char* key) {
  static const Json null;
  check(object.is_object(), "expected an object, found ", kind_of(object));
  const auto found = object.find(key);
  return found == object.end() ? null : *found;
}

// A string or a bool, which must be there unless `otherwise` stands for it.
template <class T>
T get(const Json& object, const char* key, const std::optional<T>& otherwise = {}) {
  const Json& value = member(object, key);
  if (value.is_null() && otherwise) return *otherwise;
  constexpr bool is_bool = std::is_same_v<T, bool>;
  check(is_bool ? value.is_boolean() : value.is_string(), key, ": expected ",
        is_bool ? "true or false" : "a string", ", found ", kind_of(value));
  return value.get<T>();
}

inline const Json::array_t& get_list(const Json& object, const char* key) {
  const Json& value = member(object, key);
  check(value.is_array(), key, ": expected a list, found ", kind_of(value));
  return value.get_ref<const Json::array_t&>();
}

inline Token to_number(const Json& value, const std::string& name, std::uint64_t most) {
  check(value.is_number_unsigned() && value.get<std::uint64_t>() <= most, name,
        ": expected a number from 0 to ", most, ", found ", kind_of(value));
  return value.get<Token>();
}

inline Token to_id(const Json& value) {
  return to_number(value, "id", (1 << 22) - 1);  // published vocabularies stay below 2^18
}

inline std::string get_character(const Json& object, const char* key) {
  const auto text = get<std::string>(object, key);
  check(!text.empty() && character_at(text, 0).size == text.size(), key,
        ": expected one character, found ", text);
  return text;
}

inline Regex get_pattern(const Json& object) {
  const Json& pattern = member(object, "pattern");
  if (!member(pattern, "String").is_null()) return Regex(get<std::string>(pattern, "String"), true);
  return Regex(to_pcre2(get<std::string>(pattern, "Regex")));
}

// A merge, "a b" or ["a", "b"].
inline std::pair<std::string, std::string> to_merge(const Json& value) {
  if (value.is_array() && value.size() == 2 && value[0].is_string() && value[1].is_string()) {
    return {value[0], value[1]};
  }
  check(value.is_string(), "expected \"a b\" or [\"a\", \"b\"], found ", kind_of(value));
  const auto& line = value.get_ref<const std::string&>();
  const std::size_t space = line.find(' ');
  check(space != line.npos && space == line.rfind(' '), "expected two tokens, found ", line);
  return {line.substr(0, space), line.substr(space + 1)};
}

// Calls on_step(step, type) for a normalizer, pre-tokenizer, decoder or post-processor, or, one
// after the other, for those in a Sequence. (By reference: to copy JSON that is nested without
// end takes stack without end.)
template <class OnStep>
void for_each_step(const Json& value, const char* members, OnStep on_step, int depth = 0) {
  if (value.is_null()) return;
  const auto type = get<std::string>(value, "type");
  if (type != "Sequence") return on_step(value, type);
  check(depth < 16, "too many Sequences in each other");
  for (const Json& each : get_list(value, members)) {
    for_each_step(each, members, on_step, depth + 1);
  }
}

// JSON, or an error that names what people find in its place.
inline Json parse(std::string_view text) {
  const std::size_t begin = text.find_first_not_of(" \t\r\n");
  const bool page = begin != text.npos && text[begin] == '<';
  const bool pointer = text.rfind("version https://git-lfs", 0) == 0;
  check(!text.empty(), "the file is empty");
  check(!page, "expected JSON, found a page of HTML or XML");
  check(!pointer, "expected JSON, found a Git LFS pointer; `git lfs pull` fetches the file");
  try {
    return Json::parse(text.begin(), text.end());
  } catch (const Json::parse_error& error) {
    check(false, "expected JSON, found an error at byte ", error.byte, " of ", text.size());
  } catch (const Json::exception&) {
    check(false, "expected JSON, found a number that is too large");
  }
  return {};
}

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (file.peek() != std::ifstream::traits_type::eof()) text << file.rdbuf();
  check(file.is_open() && !file.bad() && text, "tokenizer: ", path, ": cannot be read");
  return text.str();
}

}  // namespace bpe

// =======================================================================================
// Tokenizer
// =======================================================================================

class Tokenizer {
 public:
  static Tokenizer from_file(const std::string& path) {
    return from_text(bpe::read_file(path), path);
  }

  // The same from the text of a tokenizer.json; name stands for the path in messages.
  static Tokenizer from_text(std::string_view text, const std::string& name) {
    Tokenizer tokenizer;
    try {
      tokenizer.read(bpe::parse(text));
    } catch (const std::runtime_error& error) {
      std::string line = "tokenizer: " + name + ": " + tokenizer.where_ + error.what();
      std::replace_if(
          line.begin(), line.end(), [](char c) { return c >= 0 && c < ' '; }, ' ');
      throw std::runtime_error(line);
    }
    return tokenizer;
  }

  // The ids of the text alone. Bytes that are not UTF-8 count as U+FFFD. Threads may share a
  // tokenizer; they take turns.
  std::vector<Token> encode(std::string_view bytes) const {
    std::vector<Token> ids;
    std::string text;
    bpe::append_bytes(bytes, false, text);
    const std::lock_guard<std::mutex> lock(words_->mutex);
    const auto on_token = [&](Token id) { ids.push_back(id); };
    const auto on_word = [&](std::string_view word) { words_->encoder.encode(word, ids); };
    added_in_raw_.split(text, on_token, [&](std::string_view piece, bool first) {
      const std::string normal = normalize(std::string(piece), first);
      added_in_normalized_.split(normal, on_token, [&](std::string_view part, bool is_first) {
        pre_tokenize(part, first && is_first, 0, on_word);
      });
    });
    return ids;
  }

  // With the tokens that the file's post_processor puts around a prompt.
  std::vector<Token> encode_prompt(std::string_view text) const {
    std::vector<Token> ids = encode(text);
    ids.insert(ids.begin(), prefix_.begin(), prefix_.end());
    ids.insert(ids.end(), suffix_.begin(), suffix_.end());
    return ids;
  }

  // Ids that the file does not know are passed over: padded vocabularies have such.
  std::string decode(const std::vector<Token>& ids, bool skip_special_tokens = false) const;

  // The id of a token by its text in the file, for example "<|endoftext|>".
  std::optional<Token> id_of(const std::string& text) const {
    const auto added = added_ids_.find(text);
    const Token id = added != added_ids_.end() ? added->second : words_->model.id_or_none(text);
    return id < 0 ? std::nullopt : std::optional<Token>(id);
  }

  // A token's text in the file; nothing where no token has this id.
  std::optional<std::string> text_of(Token id) const {
    const bool known = id >= 0 && static_cast<std::size_t>(id) < texts_.size();
    return known ? texts_[static_cast<std::size_t>(id)] : std::nullopt;
  }

  // All ids are smaller than this; there may be ids below it without a token.
  std::size_t vocab_size() const { return texts_.size(); }

 private:
  friend class StreamDecoder;
  using Json = bpe::Json;

  struct Words {
    std::mutex mutex;
    bpe::Model model;
    bpe::WordEncoder encoder{model};  // changes as it remembers words
  };

  std::string normalize(std::string text, bool& first) const {
    for (const bpe::TextStep& step : normalizers_) text = step(text, first);
    return text;
  }

  template <class OnWord>
  void pre_tokenize(std::string_view text, bool first, std::size_t step, OnWord& on_word) const {
    if (text.empty()) return;
    if (step == pre_tokenizers_.size()) return on_word(text);
    const auto& [split, change] = pre_tokenizers_[step];
    if (!split) return pre_tokenize(change(text, first), first, step + 1, on_word);
    (*split)(text, first, [&](std::string_view piece, bool is_first) {
      pre_tokenize(piece, is_first, step + 1, on_word);
    });
  }

  void read(const Json& file) {
    where_ = "model: ";
    read_model(bpe::member(file, "model"));
    where_ = "model.merges: ";
    read_merges(bpe::member(file, "model"));
    read_steps(file, "normalizer", "normalizers", &Tokenizer::read_normalizer);
    read_steps(file, "pre_tokenizer", "pretokenizers", &Tokenizer::read_pre_tokenizer);
    read_steps(file, "decoder", "decoders", &Tokenizer::read_decoder);
    decoder_.spaces = bpe::member(file, "decoder").is_null();
    read_steps(file, "post_processor", "processors", &Tokenizer::read_post_processor);
    where_ = "";
    if (bpe::member(file, "added_tokens").is_null()) return;
    for (const Json& token : bpe::get_list(file, "added_tokens")) {
      where_ = "added_tokens: entry " + std::to_string(added_ids_.size() + 1) + ": ";
      read_added_token(token);
    }
    added_in_raw_.build();
    added_in_normalized_.build();
  }

  void read_steps(const Json& file, const std::string& key, const char* members,
                  void (Tokenizer::*read_step)(const Json&, const std::string&)) {
    where_ = key + ": ";
    bpe::for_each_step(bpe::member(file, key.c_str()), members, [&](const Json& step, auto& type) {
      where_ = key + ": " + type + ": ";
      (this->*read_step)(step, type);
      where_ = key + ": ";
    });
  }

  void read_model(const Json& model) {
    const auto type = bpe::get<std::string>(model, "type", "BPE");
    bpe::check(type == "BPE", "only the type BPE is supported, found ", type);
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      bpe::check(bpe::get<std::string>(model, key, "").empty(), key, " is not supported");
    }
    const Json& dropout = bpe::member(model, "dropout");
    bpe::check(dropout.is_null() || dropout == 0.0, "dropout is not supported");
    words_->model.unknown = bpe::get<std::string>(model, "unk_token", "");
    words_->model.fuse_unknown = bpe::get<bool>(model, "fuse_unk", false);
    words_->model.byte_fallback = bpe::get<bool>(model, "byte_fallback", false);
    words_->model.ignore_merges = bpe::get<bool>(model, "ignore_merges", false);
    where_ = "model.vocab: ";
    const Json& vocab = bpe::member(model, "vocab");
    bpe::check(vocab.is_object(), "expected an object, found ", bpe::kind_of(vocab));
    words_->model.vocab.reserve(vocab.size());
    for (const auto& [token, value] : vocab.get_ref<const Json::object_t&>()) {
      const Token id = bpe::to_id(value);
      bpe::check(!text_of(id), "two tokens have the id ", id);
      words_->model.vocab.emplace(token, id);
      set_text(id, token);
    }
    for (int b = 0; b < 256; ++b) {
      std::array<char, 8> token{};
      std::snprintf(token.data(), token.size(), "<0x%02X>", b);
      words_->model.byte_token[static_cast<std::size_t>(b)] =
          words_->model.id_or_none(token.data());
    }
  }

  void read_merges(const Json& model) {
    const Json::array_t& merges = bpe::get_list(model, "merges");
    words_->model.merges.reserve(merges.size());
    const auto known = [&](const std::string& token) {
      const Token id = words_->model.id_or_none(token);
      bpe::check(id >= 0, "not in model.vocab: ", token);
      return id;
    };
    std::uint32_t rank = 0;
    for (const Json& merge : merges) {
      if (merge.is_string() && merge.get<std::string>().rfind("#version", 0) == 0) continue;
      const auto [left, right] = bpe::to_merge(merge);
      const Token first = known(left), second = known(right);
      words_->model.merges[bpe::Model::key(first, second)] = {rank++, known(left + right)};
    }
  }

  void read_normalizer(const Json& step, const std::string& type) {
    static const std::unordered_map<std::string, int> forms = {
        {"NFD", 0},
        {"NFC", UTF8PROC_COMPOSE},
        {"NFKD", UTF8PROC_COMPAT},
        {"NFKC", UTF8PROC_COMPAT | UTF8PROC_COMPOSE}};
    const auto add = [&](const bpe::Regex& regex, const std::string& content) {
      normalizers_.push_back(bpe::Replacement{regex, content});
    };
    if (forms.count(type) != 0) {
      normalizers_.push_back([options = forms.at(type)](std::string_view text, bool&) {
        return bpe::normal_form(text, options);
      });
    } else if (type == "Prepend") {
      add(bpe::Regex("\\A"), bpe::get<std::string>(step, "prepend"));
    } else if (type == "Replace") {
      add(bpe::get_pattern(step), bpe::get<std::string>(step, "content"));
    } else if (type == "Strip") {
      if (bpe::get<bool>(step, "strip_left")) add(bpe::Regex(bpe::to_pcre2("\\A\\s+")), "");
      const bool right = bpe::get<bool>(step, "strip_right");
      if (right) add(bpe::Regex(bpe::to_pcre2("(?<!\\s)\\s++\\z")), "");
    } else {
      bpe::check(false, "not supported");
    }
  }

  void read_pre_tokenizer(const Json& step, const std::string& type) {
    const auto split = [&](const bpe::Regex& regex, const std::string& behavior,
                           bool invert = false) {
      pre_tokenizers_.push_back({bpe::Split{regex, behavior, invert}, {}});
    };
    if (type == "ByteLevel") {
      if (bpe::get<bool>(step, "add_prefix_space")) add_change(bpe::Regex("\\A(?! )"), " ");
      if (bpe::get<bool>(step, "use_regex", true)) {
        split(bpe::Regex(bpe::to_pcre2(bpe::kGpt2Pattern)), "Isolated");
      }
      pre_tokenizers_.push_back({{}, [](std::string_view text, bool&) {
                                   return bpe::byte_alphabet().to_characters(text);
                                 }});
    } else if (type == "Split") {
      static const std::unordered_set<std::string> known = {"Isolated", "Removed", "Contiguous",
                                                            "MergedWithPrevious", "MergedWithNext"};
      const auto behavior = bpe::get<std::string>(step, "behavior");
      bpe::check(known.count(behavior) != 0, "the behavior ", behavior, " is not supported");
      split(bpe::get_pattern(step), behavior, bpe::get<bool>(step, "invert"));
    } else if (type == "Digits") {
      const bool each = bpe::get<bool>(step, "individual_digits");
      split(bpe::Regex("\\p{N}"), each ? "Isolated" : "Contiguous");
    } else if (type == "Metaspace") {
      const std::string space = bpe::get_character(step, "replacement");
      const bool prefix = bpe::get<bool>(step, "add_prefix_space", true);
      const auto when = bpe::get<std::string>(step, "prepend_scheme", prefix ? "always" : "never");
      bpe::check(when == "always" || when == "first" || when == "never", "the prepend_scheme ",
                 when, " is not supported");
      add_change(bpe::Regex(" ", true), space);
      if (when == "always") add_change(bpe::Regex("\\A(?!\\Q" + space + "\\E)"), space);
      if (when == "first") add_change(bpe::Regex("\\A(?!\\Q" + space + "\\E)"), "", space);
      if (bpe::get<bool>(step, "split", true)) split(bpe::Regex(space, true), "MergedWithNext");
    } else {
      bpe::check(false, "not supported");
    }
  }

  template <class... Contents>
  void add_change(const bpe::Regex& regex, const Contents&... contents) {
    pre_tokenizers_.push_back({{}, bpe::Replacement{regex, contents...}});
  }

  void read_decoder(const Json& step, const std::string& type) {
    using Bytes = bpe::Decoder::Bytes;
    auto& steps = decoder_.bytes == Bytes::None ? decoder_.before : decoder_.after;
    const auto count = [&](const char* key) {
      return bpe::to_number(bpe::member(step, key), key, 65535);
    };
    if (type == "Fuse") {
      decoder_.fused = true;
    } else if (type == "Strip" && decoder_.fused) {
      bpe::check(decoder_.strip_count == 0 && count("stop") == 0,
                 "after Fuse only one is supported, at the start");
      decoder_.strip_content = bpe::get_character(step, "content");
      decoder_.strip_count = static_cast<std::size_t>(count("start"));
    } else if (decoder_.fused) {
      bpe::check(false, "not supported after Fuse or ByteLevel");
    } else if (type == "Replace") {
      steps.push_back({bpe::get_pattern(step), bpe::get<std::string>(step, "content")});
    } else if (type == "Strip") {
      const std::string one = "\\Q" + bpe::get_character(step, "content") + "\\E{0,";
      steps.push_back({bpe::Regex("\\A" + one + std::to_string(count("start")) + "}"), ""});
      steps.push_back({bpe::Regex(one + std::to_string(count("stop")) + "}\\z"), ""});
    } else if (decoder_.bytes != Bytes::None) {
      bpe::check(false, "not supported after ByteFallback");
    } else if (type == "ByteLevel" || type == "ByteFallback") {
      decoder_.fused = type == "ByteLevel";
      decoder_.bytes = decoder_.fused ? Bytes::Alphabet : Bytes::Fallback;
    } else if (type == "Metaspace") {
      const bool never = bpe::get<std::string>(step, "prepend_scheme", "always") == "never";
      const bpe::Regex space(bpe::get_character(step, "replacement"), true);
      steps.push_back({space, " ", never ? " " : ""});
    } else {
      bpe::check(false, "not supported");
    }
  }

  void read_post_processor(const Json& step, const std::string& type) {
    if (type == "ByteLevel") return;  // it adds no tokens
    bpe::check(prefix_.empty() && suffix_.empty(), "not supported after another that adds tokens");
    if (type == "BertProcessing" || type == "RobertaProcessing") {
      for (auto& [key, ids] : {std::pair("cls", &prefix_), std::pair("sep", &suffix_)}) {
        const Json::array_t& token = bpe::get_list(step, key);  // text and id
        bpe::check(token.size() == 2, key, ": expected a token and its id");
        *ids = {bpe::to_id(token[1])};
      }
      return;
    }
    bpe::check(type == "TemplateProcessing", "not supported");
    std::size_t texts = 0;
    for (const Json& piece : bpe::get_list(step, "single")) {
      const Json& special = bpe::member(piece, "SpecialToken");
      if (special.is_null()) {
        const auto id = bpe::get<std::string>(bpe::member(piece, "Sequence"), "id");
        texts += id == "A" ? 1 : 2;
        continue;
      }
      const auto id = bpe::get<std::string>(special, "id");
      const Json& token = bpe::member(bpe::member(step, "special_tokens"), id.c_str());
      for (const Json& each : bpe::get_list(token, "ids")) {
        (texts == 0 ? prefix_ : suffix_).push_back(bpe::to_id(each));
      }
    }
    bpe::check(texts == 1, "single: expected one Sequence, A");
  }

  void read_added_token(const Json& entry) {
    const auto flag = [&](const char* key) { return bpe::get<bool>(entry, key); };
    const Token id = bpe::to_id(bpe::member(entry, "id"));
    const auto content = bpe::get<std::string>(entry, "content");
    const bool normalized = flag("normalized");
    if (flag("special")) special_.insert(id);
    bool first = true;
    bpe::AddedToken token = {id, flag("single_word"), flag("lstrip"), flag("rstrip"), content};
    if (normalized) token.pattern = normalize(content, first);
    if (content.empty()) return;
    // The library takes the id from the vocabulary or else counts on from its end. A file
    // with another id means one thing to the library and another to who wrote it.
    const Token known = words_->model.id_or_none(content);
    const auto next = static_cast<Token>(words_->model.vocab.size() + appended_);
    bpe::check(id == (known < 0 ? next : known), "expected id ", known < 0 ? next : known,
               ", found ", id, ": ", content);
    if (known < 0) ++appended_;
    bpe::check(!token.pattern.empty(), "nothing is left of it when normalized: ", content);
    bpe::check(added_ids_.emplace(content, id).second, "the same token again: ", content);
    (normalized ? added_in_normalized_ : added_in_raw_).add(token);
    set_text(id, token.pattern);
  }

  void set_text(Token id, const std::string& text) {
    const auto i = static_cast<std::size_t>(id);
    if (i >= texts_.size()) texts_.resize(i + 1);
    texts_[i] = text;
  }

  std::string where_;  // the part of the file being read, for messages
  std::unique_ptr<Words> words_ = std::make_unique<Words>();
  std::vector<bpe::TextStep> normalizers_;
  std::vector<bpe::PreTokenizer> pre_tokenizers_;
  bpe::Decoder decoder_;
  std::vector<Token> prefix_, suffix_;  // what the post_processor adds
  bpe::AddedTokens added_in_raw_, added_in_normalized_;
  std::vector<std::optional<std::string>> texts_;  // id -> token
  std::unordered_map<std::string, Token> added_ids_;
  std::unordered_set<Token> special_;
  std::size_t appended_ = 0;  // added tokens that are not in the vocabulary
};

// =======================================================================================
// StreamDecoder
// =======================================================================================

// Text as it is made. What push() and finish() return, put together, is what decode() returns:
// a character whose bytes come in several tokens is held back until it is whole, and bytes of
// byte fallback until another token shows that no more of them follow.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special_tokens = false)
      : tokenizer_(tokenizer),
        decoder_(tokenizer.decoder_),
        skip_special_tokens_(skip_special_tokens),
        to_strip_(decoder_.strip_count) {}

  std::string push(Token id) {
    std::optional<std::string> token = tokenizer_.text_of(id);
    if (!token || (skip_special_tokens_ && tokenizer_.special_.count(id) != 0)) return "";
    const bool first = std::exchange(first_, false);
    token = changed(*token, decoder_.before, first);
    if (decoder_.bytes == bpe::Decoder::Bytes::Alphabet) {
      pending_ += bpe::byte_alphabet().to_bytes(*token);
      std::string text;
      pending_.erase(0, bpe::append_bytes(pending_, true, text));
      return stripped(text);
    }
    const bool fallback = decoder_.bytes == bpe::Decoder::Bytes::Fallback;
    const int byte = fallback ? bpe::fallback_byte(*token) : -1;
    if (byte >= 0) pending_ += static_cast<char>(byte);
    if (byte >= 0) return "";
    const std::string space = decoder_.spaces && !first ? " " : "", bytes = finish();
    return bytes + stripped(space + changed(*token, decoder_.after, false));
  }

  // What was held back. Bytes of byte fallback are text together or, each, U+FFFD.
  std::string finish() {
    std::string text, each;
    const std::string bytes = std::exchange(pending_, {});
    bpe::append_bytes(bytes, false, text);
    if (decoder_.bytes != bpe::Decoder::Bytes::Fallback) return stripped(text);
    if (text == bytes) return stripped(changed(text, decoder_.after, false));
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      each += changed(bpe::kReplacement, decoder_.after, false);
    }
    return stripped(each);
  }

 private:
  static std::string changed(std::string token, const std::vector<bpe::Replacement>& steps,
                             const bool first) {
    for (const bpe::Replacement& step : steps) {
      bool is_first = first;
      token = step(token, is_first);
    }
    return token;
  }

  std::string stripped(std::string text) {
    to_strip_ = bpe::strip_start(text, decoder_.strip_content, to_strip_);
    return text;
  }

  const Tokenizer& tokenizer_;
  const bpe::Decoder& decoder_;
  bool skip_special_tokens_;
  bool first_ = true;     // no token has come yet
  std::size_t to_strip_;  // how much may still be taken from the start of the text
  std::string pending_;   // bytes
};

inline std::string Tokenizer::decode(const std::vector<Token>& ids,
                                     bool skip_special_tokens) const {
  StreamDecoder decoder(*this, skip_special_tokens);
  std::string text;
  for (const Token id : ids) text += decoder.push(id);
  return text + decoder.finish();
}

}  // namespace mamba
