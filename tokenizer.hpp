// tokenizer.hpp: text to token ids and back.
//
// Reads a Hugging Face `tokenizer.json` that holds a byte-level BPE (GPT-2, GPT-NeoX, all
// state-spaces Mamba models) and gives the ids that the Rust library `tokenizers` gives for
// `encode(text, add_special_tokens=False)`. Needs nlohmann/json and utf8proc.
//
//     Tokenizer tokenizer = Tokenizer::from_file("weights/stories/tokenizer.json");
//     std::vector<Token> ids = tokenizer.encode("Once upon a time");
//     std::string text = tokenizer.decode(ids);
//
// Byte-level byte-pair encoding in five steps:
//
//   1. Added tokens such as <|endoftext|> are cut out of the text; each is one id.
//   2. The rest is brought to Unicode normal form C: e + U+0301 becomes U+00E9.
//   3. It is split into words; a space goes with the word behind it:
//          "low lower" -> "low" " lower"
//   4. A word is taken as bytes. Every byte is a token, so that nothing is unknown. Files
//      write each byte as one visible character, the space as Ġ.
//   5. The pair of neighbours that comes first in the list of merges becomes one token, the
//      leftmost if it occurs twice; again, until no neighbours are in the list:
//          merges:  0 "e r"   1 "l o"   2 "lo w"   3 "Ġ low"
//          Ġ l o w e r -0-> Ġ l o w er -1-> Ġ lo w er -2-> Ġ low er   (-3-> Ġlow er)
//
// Decoding puts the bytes of all tokens one after the other; only then are they text again.
//
// Left out are `truncation`, `padding` and `post_processor`, which put tokens around
// encoded text or take some away. Anything else that a file asks for and that is not done
// here is an error.
#pragma once

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <fstream>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
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

// =======================================================================================
// UTF-8
// =======================================================================================

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

// The start of the character that ends at i > 0, in valid text.
inline std::size_t previous(std::string_view text, std::size_t i) {
  do --i;
  while (i > 0 && (text[i] & 0xC0) == 0x80);
  return i;
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
    const std::size_t ascii = ascii_end(bytes, i);
    text += bytes.substr(i, ascii - i);
    i = ascii;
    if (i == bytes.size()) break;
    const Character c = character_at(bytes, i);
    if (c.cut_off && keep_cut_off) return i;
    text += c.valid ? bytes.substr(i, c.size) : std::string_view("\xEF\xBF\xBD");
    i += c.size;
  }
  return bytes.size();
}

// =======================================================================================
// The byte alphabet: byte <-> visible character
// =======================================================================================

// Bytes that are visible in Latin-1 stand for themselves; the other 68, in order, are
// U+0100 to U+0143, so that the space (0x20) is U+0120, Ġ.
struct ByteAlphabet {
  std::array<std::string, 256> character;  // byte -> character, as UTF-8
  std::array<std::int16_t, 0x144> byte;    // code point -> byte, or -1

  ByteAlphabet() {
    byte.fill(-1);
    char32_t next = 0x100;
    for (char32_t b = 0; b < 256; ++b) {
      const bool visible = (b > 0x20 && b < 0x7F) || (b > 0xA0 && b != 0xAD);
      const char32_t code = visible ? b : next++;
      append_character(code, character[b]);
      byte[code] = static_cast<std::int16_t>(b);
    }
  }

  // The bytes that a token stands for. A token with any other character in it (only added
  // tokens have them) stands for its own text.
  std::string bytes_of(const std::string& token) const {
    std::string bytes;
    for (std::size_t i = 0; i < token.size();) {
      const Character c = character_at(token, i);
      if (c.code >= byte.size() || byte[c.code] < 0) return token;
      bytes += static_cast<char>(byte[c.code]);
      i += c.size;
    }
    return bytes;
  }

  std::string token_of(std::string_view bytes) const {
    std::string token;
    for (const char b : bytes) token += character[static_cast<std::uint8_t>(b)];
    return token;
  }
};

inline const ByteAlphabet& byte_alphabet() {
  static const ByteAlphabet alphabet;
  return alphabet;
}

// =======================================================================================
// Unicode: kinds of characters, normal form C
// =======================================================================================

inline utf8proc_category_t category(char32_t c) {
  return utf8proc_category(static_cast<utf8proc_int32_t>(c));
}

// \s, \p{L}, \p{N}, and the rest.
enum class Kind : std::uint8_t { Space, Letter, Number, Other };

inline bool is_space(char32_t c) {  // the Unicode property White_Space
  if (c < 0x80) return c == ' ' || (c >= '\t' && c <= '\r');
  return c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 ||
         c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

inline Kind kind_of(char32_t c) {
  if (is_space(c)) return Kind::Space;
  if (c < 0x80) {
    const bool letter = (c | 0x20) >= 'a' && (c | 0x20) <= 'z';
    return letter ? Kind::Letter : c >= '0' && c <= '9' ? Kind::Number : Kind::Other;
  }
  const utf8proc_category_t k = category(c);
  if (k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_LO) return Kind::Letter;
  if (k >= UTF8PROC_CATEGORY_ND && k <= UTF8PROC_CATEGORY_NO) return Kind::Number;
  return Kind::Other;
}

// \w: Alphabetic, marks, decimal digits, connectors, joiners. Alphabetic is L, Nl and
// Other_Alphabetic, which outside the marks is four rows of circled and squared letters.
inline bool is_word(char32_t c) {
  const utf8proc_category_t k = category(c);
  return (k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_NL) || k == UTF8PROC_CATEGORY_PC ||
         c == 0x200C || c == 0x200D || (c >= 0x24B6 && c <= 0x24E9) ||
         (c >= 0x1F130 && c <= 0x1F149) || (c >= 0x1F150 && c <= 0x1F169) ||
         (c >= 0x1F170 && c <= 0x1F189);
}

// Decompose, sort marks by combining class, compose. (Some hundred marks are younger than
// the Rust library's tables, Unicode 10; it leaves them where they stand.)
inline void append_nfc_segment(std::string_view segment, std::string& out) {
  std::vector<utf8proc_int32_t> codes;
  std::array<utf8proc_int32_t, 32> parts{};  // the longest canonical decomposition has 4
  for (std::size_t i = 0; i < segment.size();) {
    const Character c = character_at(segment, i);
    const auto count = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c.code), parts.data(),
                                               parts.size(), UTF8PROC_DECOMPOSE, nullptr);
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
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  const auto size = static_cast<utf8proc_ssize_t>(codes.size());
  codes.resize(static_cast<std::size_t>(utf8proc_normalize_utf32(codes.data(), size, options)));
  for (const auto code : codes) append_character(static_cast<char32_t>(code), out);
}

// Normal form C. Two ASCII characters side by side never interact, and below U+0300 (lead
// byte 0xCC) every character is its own normal form: only segments of one ASCII character
// and the non-ASCII ones behind it are worked on.
inline std::string nfc(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t ascii = ascii_end(text, i);
    const std::size_t begin = ascii > i && ascii < text.size() ? ascii - 1 : ascii;
    out += text.substr(i, begin - i);
    bool simple = true;
    for (i = ascii; i < text.size() && static_cast<std::uint8_t>(text[i]) >= 0x80; ++i) {
      simple = simple && static_cast<std::uint8_t>(text[i]) < 0xCC;
    }
    const std::string_view segment = text.substr(begin, i - begin);
    if (simple) out += segment;
    if (!simple) append_nfc_segment(segment, out);
  }
  return out;
}

// =======================================================================================
// Splitting text into words
// =======================================================================================

// The pattern of GPT-2, which ByteLevel uses unless the file says otherwise.
constexpr const char* kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// Where its match that starts at begin ends.
inline std::size_t gpt2_word_end(std::string_view text, std::size_t begin) {
  if (text[begin] == '\'') {
    for (const std::string_view tail : {"s", "t", "re", "ve", "m", "ll", "d"}) {
      if (text.substr(begin + 1, tail.size()) == tail) return begin + 1 + tail.size();
    }
  }
  std::size_t i = begin;
  if (text[i] == ' ' && i + 1 < text.size()) ++i;  // " ?"; in white space it changes nothing
  const Kind kind = kind_of(character_at(text, i).code);
  std::size_t last = i;  // where the last character of the run starts
  while (i < text.size()) {
    const Character c = character_at(text, i);
    if (kind_of(c.code) != kind) break;
    last = i;
    i += c.size;
  }
  // \s+(?!\S): in front of a word, white space leaves its last character to the next match.
  return kind == Kind::Space && i < text.size() && last > begin ? last : i;
}

// What is done to a piece of text before it is a word.
enum class Step : std::uint8_t { PrefixSpace, Gpt2Words };

// =======================================================================================
// Byte-pair encoding of one word
// =======================================================================================

// A hash map from two 32-bit numbers to one.
using PairMap = std::unordered_map<std::uint64_t, std::uint32_t>;

inline std::uint64_t pair_key(std::uint32_t a, std::uint32_t b) {
  return static_cast<std::uint64_t>(a) << 32 | b;
}

class BytePairEncoder {
 public:
  std::array<Token, 256> byte_token{};  // byte -> id, or -1 where the vocabulary has none
  Token unknown = -1;                   // stands for bytes without a token; -1: they vanish
  bool fuse_unknown = false;            // one for a run of them
  PairMap rank;                         // (left id, right id) -> place in the list of merges
  std::vector<Token> merged;            // place in the list of merges -> id of both together
  std::unordered_map<std::string, Token> whole_words;  // `ignore_merges`: bytes -> id

  // Appends the ids of one word. Words are remembered, for text repeats them.
  void encode(std::string_view word, std::vector<Token>& ids) {
    if (word.size() > kLongestRemembered) return merge(word, ids);
    if (memory_.size() == kRemembered) memory_.clear();
    std::vector<Token>& remembered = memory_[std::string(word)];
    if (remembered.empty()) merge(word, remembered);
    ids.insert(ids.end(), remembered.begin(), remembered.end());
  }

 private:
  static constexpr std::size_t kLongestRemembered = 64, kRemembered = 1 << 16;
  static constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

  struct Symbol {  // a token of the word
    Token id;
    std::uint32_t rank;         // of the pair that it makes with its right neighbour
    std::uint32_t left, right;  // neighbours: indices in symbols_
  };

  // Steps 4 and 5 of the head of this file, in O(n log n): a queue holds the pairs, best
  // rank first, then leftmost; one that has changed since it was queued is passed over.
  void merge(std::string_view word, std::vector<Token>& ids) {
    const auto whole =
        whole_words.empty() ? whole_words.end() : whole_words.find(std::string(word));
    if (whole != whole_words.end()) return ids.push_back(whole->second);
    to_symbols(word);
    queue_.clear();
    for (std::uint32_t i = 0; i < symbols_.size(); ++i) queue_pair(i);
    while (!queue_.empty()) {
      std::pop_heap(queue_.begin(), queue_.end(), std::greater<>());
      const auto best = static_cast<std::uint32_t>(queue_.back() >> 32);
      const auto i = static_cast<std::uint32_t>(queue_.back());
      queue_.pop_back();
      Symbol& left = symbols_[i];
      if (left.rank != best) continue;
      Symbol& right = symbols_[left.right];
      left.id = merged[best];
      left.right = right.right;
      if (right.right != kNone) symbols_[right.right].left = i;
      right.rank = kNone;  // gone, and its pair with it
      queue_pair(i);
      if (left.left != kNone) queue_pair(left.left);
    }
    for (std::uint32_t i = symbols_.empty() ? kNone : 0; i != kNone; i = symbols_[i].right) {
      ids.push_back(symbols_[i].id);
    }
  }

  void to_symbols(std::string_view word) {
    if (word.size() >= kNone) throw std::runtime_error("tokenizer: a word of 4 GiB or more");
    symbols_.clear();
    bool after_unknown = false;
    for (const char c : word) {
      const Token id = byte_token[static_cast<std::uint8_t>(c)];
      const bool skip = id < 0 && (unknown < 0 || (after_unknown && fuse_unknown));
      after_unknown = id < 0;
      if (skip) continue;
      const auto i = static_cast<std::uint32_t>(symbols_.size());
      symbols_.push_back({id < 0 ? unknown : id, kNone, i == 0 ? kNone : i - 1, i + 1});
    }
    if (!symbols_.empty()) symbols_.back().right = kNone;
  }

  // Looks up the pair that symbol i makes with its right neighbour and queues it.
  void queue_pair(std::uint32_t i) {
    Symbol& symbol = symbols_[i];
    symbol.rank = kNone;
    if (symbol.right == kNone) return;
    const auto found = rank.find(pair_key(static_cast<std::uint32_t>(symbol.id),
                                          static_cast<std::uint32_t>(symbols_[symbol.right].id)));
    if (found == rank.end()) return;
    symbol.rank = found->second;
    queue_.push_back(pair_key(symbol.rank, i));
    std::push_heap(queue_.begin(), queue_.end(), std::greater<>());
  }

  std::unordered_map<std::string, std::vector<Token>> memory_;
  std::vector<Symbol> symbols_;
  std::vector<std::uint64_t> queue_;  // (rank, index of the left symbol)
};

// =======================================================================================
// Added tokens
// =======================================================================================

struct AddedToken {
  Token id;
  std::string content;
  bool single_word;  // only between characters that are not \w
  bool lstrip;       // swallows white space to its left
  bool rstrip;       // and to its right
  bool normalized;   // sought in the normalized text, in its own normal form
  bool special;      // not shown with skip_special_tokens
};

// Finds added tokens in text: leftmost first, of those the longest. A trie of bytes.
class AddedTokens {
 public:
  void insert(const std::string& pattern, const AddedToken& token) {
    std::uint32_t node = 0;
    for (const char c : pattern) {
      const auto next = static_cast<std::uint32_t>(token_at_.size());
      const auto edge = edges_.emplace(pair_key(node, static_cast<std::uint8_t>(c)), next);
      if (edge.second) token_at_.push_back(-1);
      node = edge.first->second;
    }
    starts_[static_cast<std::uint8_t>(pattern.at(0))] = true;
    token_at_[node] = static_cast<std::int32_t>(tokens_.size());
    tokens_.push_back(token);
  }

  // Appends the ids of the added tokens in text and hands over, in order, what is between.
  template <class OnPiece>
  void split(std::string_view text, std::vector<Token>& ids, OnPiece on_piece) const {
    std::size_t done = 0;
    for (std::size_t i = 0; i < text.size();) {
      std::size_t begin = i++, end = begin;
      const AddedToken* token = longest(text, begin, end);
      if (token == nullptr) continue;
      i = end;
      if (token->single_word && !stands_alone(text, begin, end)) continue;
      while (token->lstrip && begin > done && space_at(text, previous(text, begin))) {
        begin = previous(text, begin);
      }
      if (token->lstrip) begin = std::max(begin, done);
      while (token->rstrip && end < text.size() && space_at(text, end)) {
        end += character_at(text, end).size;
      }
      if (done < begin) on_piece(text.substr(done, begin - done));
      if (begin < end) ids.push_back(token->id);  // not if the token before it swallowed it
      done = end;
    }
    if (done < text.size()) on_piece(text.substr(done));
  }

 private:
  const AddedToken* longest(std::string_view text, std::size_t i, std::size_t& end) const {
    if (!starts_[static_cast<std::uint8_t>(text[i])]) return nullptr;
    const AddedToken* found = nullptr;
    for (std::uint32_t node = 0; i < text.size();) {
      const auto edge = edges_.find(pair_key(node, static_cast<std::uint8_t>(text[i++])));
      if (edge == edges_.end()) break;
      node = edge->second;
      if (token_at_[node] < 0) continue;
      found = &tokens_[static_cast<std::size_t>(token_at_[node])];
      end = i;
    }
    return found;
  }

  static bool space_at(std::string_view text, std::size_t i) {
    return is_space(character_at(text, i).code);
  }

  static bool stands_alone(std::string_view text, std::size_t begin, std::size_t end) {
    return (begin == 0 || !is_word(character_at(text, previous(text, begin)).code)) &&
           (end == text.size() || !is_word(character_at(text, end).code));
  }

  std::vector<AddedToken> tokens_;
  PairMap edges_;                              // (node, byte) -> node; the root is 0
  std::vector<std::int32_t> token_at_ = {-1};  // node -> index in tokens_, or -1
  std::array<bool, 256> starts_{};             // bytes that some token starts with
};

// =======================================================================================
// Reading tokenizer.json
// =======================================================================================

using Json = nlohmann::json;

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream line;
  (line << ... << parts);
  throw std::runtime_error(line.str());
}

// The member, or null where there is none.
inline const Json& member(const Json& object, const char* key) {
  static const Json null;
  const auto found = object.find(key);
  return found == object.end() ? null : *found;
}

template <class T>
T value_or(const Json& object, const char* key, const T& otherwise) {
  const Json& value = member(object, key);
  return value.is_null() ? otherwise : value.get<T>();
}

inline Token to_id(const Json& value) {
  constexpr std::uint64_t kMost = 1 << 22;  // published vocabularies stay below 2^18
  check(value.is_number_unsigned() && value.get<std::uint64_t>() < kMost,
        "expected an id from 0 to ", kMost - 1, ", found ",
        value.is_number() ? value.dump() : value.type_name());
  return value.get<Token>();
}

// A merge, "a b" or ["a", "b"].
inline std::pair<std::string, std::string> to_merge(const Json& value) {
  if (value.is_array() && value.size() == 2) return {value[0], value[1]};
  check(value.is_string(), "expected \"a b\" or [\"a\", \"b\"], found ", value.type_name());
  const auto& line = value.get_ref<const std::string&>();
  const std::size_t space = line.find(' ');
  check(space != line.npos && space == line.rfind(' '), "expected two tokens, found ", line);
  return {line.substr(0, space), line.substr(space + 1)};
}

// A normalizer or pre-tokenizer, which may be null or a Sequence, as a list without these.
// (By pointer: to copy JSON that is nested without end takes stack without end.)
inline void flatten(const Json& value, const char* members, std::vector<const Json*>& list,
                    int depth = 0) {
  if (value.is_null()) return;
  if (value.at("type") != "Sequence") return list.push_back(&value);
  check(depth < 16, "too many Sequences in each other");
  for (const Json& each : value.at(members)) flatten(each, members, list, depth + 1);
}

}  // namespace bpe

// =======================================================================================
// Tokenizer
// =======================================================================================

class Tokenizer {
 public:
  static Tokenizer from_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    text << file.rdbuf();
    if (!file || !text) throw std::runtime_error("tokenizer: " + path + ": cannot be read");
    return from_text(text.str(), path);
  }

  // The same from the text of a tokenizer.json; name stands for the path in messages.
  static Tokenizer from_text(std::string_view text, const std::string& name) {
    Tokenizer tokenizer;
    std::string where = "JSON";
    try {
      tokenizer.read(bpe::Json::parse(text.begin(), text.end()), where);
    } catch (const std::exception& error) {
      std::string line = "tokenizer: " + name + ": " + where + ": " + error.what();
      std::replace_if(
          line.begin(), line.end(), [](char c) { return c >= 0 && c < ' '; }, ' ');
      throw std::runtime_error(line);
    }
    return tokenizer;
  }

  // Bytes that are not UTF-8 count as U+FFFD. Threads may share a tokenizer; they take
  // turns.
  std::vector<Token> encode(std::string_view text) const {
    const std::lock_guard<std::mutex> lock(words_->mutex);
    std::vector<Token> ids;
    std::string repaired;
    if (bpe::ascii_end(text, 0) < text.size()) {
      bpe::append_bytes(text, false, repaired);
      text = repaired;
    }
    added_in_raw_.split(text, ids, [&](std::string_view piece) {
      const bool normalize = nfc_ && bpe::ascii_end(piece, 0) < piece.size();
      const std::string normal_form = normalize ? bpe::nfc(piece) : "";
      added_in_normalized_.split(normalize ? normal_form : piece, ids,
                                 [&](std::string_view part) { encode_piece(part, 0, ids); });
    });
    return ids;
  }

  // Ids that the file does not know are passed over: padded vocabularies have such.
  std::string decode(const std::vector<Token>& ids, bool skip_special_tokens = false) const {
    std::string bytes, text;
    for (const Token id : ids) bytes += bytes_of(id, skip_special_tokens);
    bpe::append_bytes(bytes, false, text);
    return text;
  }

  // What one id stands for; half a character is possible.
  std::string_view bytes_of(Token id, bool skip_special_tokens = false) const {
    if (id < 0 || static_cast<std::size_t>(id) >= bytes_.size()) return {};
    if (skip_special_tokens && special_.count(id) != 0) return {};
    return bytes_[static_cast<std::size_t>(id)];
  }

  // The id of a token by its text, for example "<|endoftext|>".
  std::optional<Token> find(std::string_view text) const {
    const auto added = added_ids_.find(std::string(text));
    if (added != added_ids_.end()) return added->second;
    const Token id = id_or_none(bpe::byte_alphabet().token_of(text));
    return id < 0 ? std::nullopt : std::optional<Token>(id);
  }

  std::vector<Token> encode_prompt(std::string_view text) const { return encode(text); }
  std::optional<Token> id_of(std::string_view text) const { return find(text); }
  std::optional<std::string> text_of(Token id) const {
    const std::string_view bytes = bytes_of(id);
    return bytes.empty() ? std::nullopt : std::optional<std::string>(bytes);
  }

  // All ids are smaller than this.
  std::size_t vocab_size() const { return bytes_.size(); }

 private:
  using Json = bpe::Json;

  struct Words {
    std::mutex mutex;
    bpe::BytePairEncoder encoder;  // changes as it remembers words
  };

  Tokenizer() : words_(std::make_unique<Words>()) {}

  void encode_piece(std::string_view piece, std::size_t step, std::vector<Token>& ids) const {
    if (step == steps_.size()) return words_->encoder.encode(piece, ids);
    if (steps_[step] == bpe::Step::PrefixSpace) {
      if (piece[0] == ' ') return encode_piece(piece, step + 1, ids);
      return encode_piece(" " + std::string(piece), step + 1, ids);
    }
    for (std::size_t begin = 0, end = 0; begin < piece.size(); begin = end) {
      end = bpe::gpt2_word_end(piece, begin);
      encode_piece(piece.substr(begin, end - begin), step + 1, ids);
    }
  }

  // `where` follows the reading, for messages.
  void read(const Json& file, std::string& where) {
    where = "model";
    read_model(file.at("model"));
    where = "model.vocab";
    read_vocab(file["model"]);
    where = "model.merges";
    read_merges(file["model"].at("merges"));
    where = "normalizer";
    read_normalizer(bpe::member(file, "normalizer"));
    where = "pre_tokenizer";
    read_pre_tokenizer(bpe::member(file, "pre_tokenizer"));
    for (const Json& token : bpe::member(file, "added_tokens")) {
      where = "added_tokens: entry " + std::to_string(added_ids_.size() + 1);
      read_added_token(token);
    }
    where = "decoder";
    bpe::check(file.at("decoder").at("type") == "ByteLevel", "only ByteLevel is supported");
  }

  void read_model(const Json& model) {
    bpe::check(bpe::value_or<std::string>(model, "type", "BPE") == "BPE",
               "only the type BPE is supported");
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      bpe::check(bpe::value_or<std::string>(model, key, "").empty(), key, " is not supported");
    }
    bpe::check(!bpe::value_or(model, "byte_fallback", false), "byte_fallback is not supported");
    bpe::check(bpe::value_or(model, "dropout", 0.0) == 0.0, "dropout is not supported");
  }

  void read_vocab(const Json& model) {
    std::unordered_set<Token> seen;
    vocab_.reserve(model.at("vocab").size());
    for (const auto& [token, value] : model.at("vocab").get_ref<const Json::object_t&>()) {
      const Token id = bpe::to_id(value);
      bpe::check(seen.insert(id).second, "two tokens have the id ", id);
      vocab_.emplace(token, id);
      set_bytes(id, token);
    }
    bpe::BytePairEncoder& encoder = words_->encoder;
    const auto unknown = bpe::value_or<std::string>(model, "unk_token", "");
    encoder.unknown = id_or_none(unknown);
    encoder.fuse_unknown = bpe::value_or(model, "fuse_unk", false);
    for (std::size_t b = 0; b < 256; ++b) {
      encoder.byte_token[b] = id_or_none(bpe::byte_alphabet().character[b]);
      bpe::check(encoder.byte_token[b] >= 0 || encoder.unknown >= 0 || unknown.empty(),
                 "lacks the unk_token ", unknown);
    }
    if (!bpe::value_or(model, "ignore_merges", false)) return;
    for (const auto& [token, id] : vocab_) {
      const std::string bytes(bytes_of(id));
      if (bpe::byte_alphabet().token_of(bytes) == token) encoder.whole_words.emplace(bytes, id);
    }
  }

  void read_merges(const Json& merges) {
    bpe::BytePairEncoder& encoder = words_->encoder;
    encoder.rank.reserve(merges.size());
    const auto known = [&](const std::string& token) {
      const Token id = id_or_none(token);
      bpe::check(id >= 0, "not in model.vocab: ", token);
      return id;
    };
    for (const Json& merge : merges.get_ref<const Json::array_t&>()) {
      if (merge.is_string() && merge.get<std::string>().rfind("#version", 0) == 0) continue;
      const auto [left, right] = bpe::to_merge(merge);
      const auto pair = bpe::pair_key(static_cast<std::uint32_t>(known(left)),
                                      static_cast<std::uint32_t>(known(right)));
      encoder.rank[pair] = static_cast<std::uint32_t>(encoder.merged.size());
      encoder.merged.push_back(known(left + right));
    }
  }

  void read_normalizer(const Json& normalizer) {
    std::vector<const Json*> list;
    bpe::flatten(normalizer, "normalizers", list);
    for (const Json* one : list) {
      bpe::check(one->at("type") == "NFC", "only NFC is supported");
    }
    nfc_ = !list.empty();
  }

  void read_pre_tokenizer(const Json& pre_tokenizer) {
    std::vector<const Json*> list;
    bpe::flatten(pre_tokenizer, "pretokenizers", list);
    bpe::check(!list.empty() && list.back()->at("type") == "ByteLevel",
               "expected ByteLevel, alone or at the end of a Sequence");
    const Json& byte_level = *list.back();
    list.pop_back();
    for (const Json* one : list) {
      bpe::check(one->at("type") == "Split" && splits_by_gpt2_pattern(*one),
                 "only Split by the pattern of GPT-2 is supported before ByteLevel");
      steps_.push_back(bpe::Step::Gpt2Words);
    }
    if (byte_level.at("add_prefix_space").get<bool>()) {
      steps_.push_back(bpe::Step::PrefixSpace);
    }
    if (bpe::value_or(byte_level, "use_regex", true)) steps_.push_back(bpe::Step::Gpt2Words);
  }

  // The pattern covers all of any text, so that to keep its matches apart (Isolated) and to
  // remove what is not one (Removed, inverted) is the same.
  static bool splits_by_gpt2_pattern(const Json& split) {
    const Json& behavior = split.at("behavior");
    return bpe::member(split.at("pattern"), "Regex") == bpe::kGpt2Pattern &&
           (behavior == "Isolated" || (behavior == "Removed" && split.at("invert") == true));
  }

  void read_added_token(const Json& entry) {
    const auto flag = [&](const char* key) { return entry.at(key).get<bool>(); };
    const bpe::AddedToken token = {bpe::to_id(entry.at("id")),
                                   entry.at("content"),
                                   flag("single_word"),
                                   flag("lstrip"),
                                   flag("rstrip"),
                                   flag("normalized"),
                                   flag("special")};
    if (token.content.empty()) return;
    // The library takes the id from the vocabulary or else counts on from its end. A file
    // with another id means one thing to the library and another to who wrote it.
    const Token known = id_or_none(token.content);
    const auto next = static_cast<Token>(vocab_.size() + appended_);
    bpe::check(token.id == (known < 0 ? next : known), "expected id ", known < 0 ? next : known,
               ", found ", token.id, ": ", token.content);
    if (known < 0) ++appended_;
    const bool normalize = nfc_ && token.normalized;
    const std::string pattern = normalize ? bpe::nfc(token.content) : token.content;
    bpe::check(added_ids_.emplace(token.content, token.id).second &&
                   patterns_.insert((token.normalized ? "n" : "r") + pattern).second,
               "the same token again: ", token.content);
    (token.normalized ? added_in_normalized_ : added_in_raw_).insert(pattern, token);
    set_bytes(token.id, pattern);
    if (token.special) special_.insert(token.id);
  }

  Token id_or_none(const std::string& token) const {
    const auto found = vocab_.find(token);
    return found == vocab_.end() ? -1 : found->second;
  }

  void set_bytes(Token id, const std::string& token) {
    const auto i = static_cast<std::size_t>(id);
    if (i >= bytes_.size()) bytes_.resize(i + 1);
    bytes_[i] = bpe::byte_alphabet().bytes_of(token);
  }

  std::unique_ptr<Words> words_;
  bool nfc_ = false;
  std::vector<bpe::Step> steps_;
  bpe::AddedTokens added_in_raw_, added_in_normalized_;
  std::vector<std::string> bytes_;                // id -> bytes
  std::unordered_map<std::string, Token> vocab_;  // token in the byte alphabet -> id
  std::unordered_map<std::string, Token> added_ids_;
  std::unordered_set<std::string> patterns_;  // of added tokens, raw and normalized
  std::unordered_set<Token> special_;
  std::size_t appended_ = 0;  // added tokens that are not in the vocabulary
};

// =======================================================================================
// StreamDecoder
// =======================================================================================

// Text as it is made. What push() and finish() return, put together, is what decode()
// returns; a character whose bytes come in several tokens is held back until it is whole.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer, bool skip_special_tokens = false)
      : tokenizer_(tokenizer), skip_special_tokens_(skip_special_tokens) {}

  std::string push(Token id) {
    pending_ += tokenizer_.bytes_of(id, skip_special_tokens_);
    std::string text;
    pending_.erase(0, bpe::append_bytes(pending_, true, text));
    return text;
  }

  std::string finish() {
    std::string text;
    bpe::append_bytes(std::exchange(pending_, {}), false, text);
    return text;
  }

 private:
  const Tokenizer& tokenizer_;
  bool skip_special_tokens_;
  std::string pending_;  // at most three bytes between calls
};

}  // namespace mamba
