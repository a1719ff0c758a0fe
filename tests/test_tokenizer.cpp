// The tokenizer against the Rust library's answers, and every rule on a tokenizer so small
// that the answer can be worked out by hand.
#include <cstdlib>
#include <random>

#include "../tokenizer.hpp"
#include "catch.hpp"

namespace {

using mamba::StreamDecoder;
using mamba::Token;
using mamba::Tokenizer;
using Ids = std::vector<Token>;
using Json = nlohmann::json;

std::string root(const std::string& path) {
  const char* given = std::getenv("MAMBA_ROOT");
  return std::string(given != nullptr ? given : ".") + "/" + path;
}

Json read_json(const std::string& path) {
  std::ifstream file(path);
  REQUIRE(file);
  return Json::parse(file);
}

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (std::size_t i = 0; i < hex.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  }
  return bytes;
}

// The id of a byte is the byte. No merges, no added tokens, no normalizer.
Json bytes_only() {
  Json vocab;
  for (int b = 0; b < 256; ++b) {
    vocab[mamba::bpe::kByteAlphabet.character[static_cast<std::size_t>(b)]] = b;
  }
  return {{"normalizer", nullptr},
          {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
          {"decoder", {{"type", "ByteLevel"}}},
          {"added_tokens", Json::array()},
          {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", Json::array()}}}};
}

// Adds merges, each with its token, whose ids go on from 256.
Json with_merges(const std::vector<std::pair<std::string, std::string>>& merges) {
  Json file = bytes_only();
  Json& model = file["model"];
  for (const auto& [left, right] : merges) {
    if (!model["vocab"].contains(left + right)) {
      model["vocab"][left + right] = model["vocab"].size();
    }
    model["merges"].push_back({left, right});
  }
  return file;
}

void add_token(Json& file, const std::string& content, const std::vector<std::string>& flags = {}) {
  Json token = {{"id", file["model"]["vocab"].size() + file["added_tokens"].size()},
                {"content", content}};
  for (const char* flag : {"single_word", "lstrip", "rstrip", "normalized", "special"}) {
    token[flag] = std::find(flags.begin(), flags.end(), flag) != flags.end();
  }
  file["added_tokens"].push_back(token);
}

Tokenizer made(const Json& file) { return Tokenizer::from_text(file.dump(), "test.json"); }

// The ids of a text of bytes, with other ids in it: ids("ab", 256, "c").
void append(Ids& ids, std::string_view text) {
  for (const char c : text) ids.push_back(static_cast<std::uint8_t>(c));
}
void append(Ids& ids, Token id) { ids.push_back(id); }
template <class... Parts>
Ids ids_of(const Parts&... parts) {
  Ids ids;
  (append(ids, parts), ...);
  return ids;
}

std::vector<std::string> words_of(std::string_view text,
                                  const char* pattern = mamba::bpe::kGpt2Pattern,
                                  const char* behavior = "Isolated") {
  std::vector<std::string> words;
  const mamba::bpe::Regex regex = mamba::bpe::file_pattern(pattern);
  mamba::bpe::Split{regex, behavior}(text, [&](auto word) { words.emplace_back(word); });
  return words;
}

std::string error_of(const std::string& text) {
  try {
    Tokenizer::from_text(text, "some.json");
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

std::string streamed(const Tokenizer& tokenizer, const Ids& ids, bool skip_special) {
  StreamDecoder decoder(tokenizer, skip_special);
  std::string text;
  for (const Token id : ids) {
    const std::string part = decoder.push(id);
    std::string repaired;
    mamba::bpe::append_bytes(part, false, repaired);
    CHECK(part == repaired);  // never half a character
    text += part;
  }
  return text + decoder.finish();
}

}  // namespace

// ---- against the Rust library ---------------------------------------------------------

TEST_CASE("tokenizer: weights/stories gives the ids and texts of the Rust library") {
  const Tokenizer tokenizer = Tokenizer::from_file(root("weights/stories/tokenizer.json"));
  const Json golden = read_json(root("tests/golden/tokenizer_stories.json"));
  CHECK(tokenizer.vocab_size() == 4096);
  CHECK(tokenizer.id_of("<|endoftext|>") == 0);
  CHECK(tokenizer.text_of(0) == "<|endoftext|>");
  CHECK(tokenizer.text_of(4096) == std::nullopt);
  CHECK(tokenizer.text_of(-1) == std::nullopt);
  REQUIRE(golden["encode"].size() > 100);
  for (const Json& row : golden["encode"]) {
    CAPTURE(row.dump());
    const Ids ids = row["ids"];
    CHECK(tokenizer.encode(from_hex(row["bytes"])) == ids);
    CHECK(tokenizer.decode(ids) == row["text"]);
    CHECK(streamed(tokenizer, ids, false) == row["text"]);
  }
  for (const Json& row : golden["decode"]) {
    CAPTURE(row.dump());
    const Ids ids = row["ids"];
    CHECK(tokenizer.decode(ids) == row["text"]);
    CHECK(tokenizer.decode(ids, true) == row["without_special"]);
    CHECK(streamed(tokenizer, ids, false) == row["text"]);
    CHECK(streamed(tokenizer, ids, true) == row["without_special"]);
  }
}

TEST_CASE("tokenizer: variants of files give the ids and texts of the Rust library") {
  const Json golden = read_json(root("tests/golden/tokenizer_variants.json"));
  const Json stories = read_json(root("weights/stories/tokenizer.json"));
  REQUIRE(golden["variants"].size() == 28);
  for (const Json& variant : golden["variants"]) {
    CAPTURE(variant["name"].get<std::string>());
    Json file = variant["base"] == "stories" ? stories : golden["fallback"];
    file.merge_patch(variant["patch"]);
    const Tokenizer tokenizer = made(file);
    for (const Json& row : variant["encode"]) {
      CAPTURE(row.dump());
      const Ids ids = row["ids"], prompt = row.value("prompt", ids);
      CHECK(tokenizer.encode(row["text"].get<std::string>()) == ids);
      CHECK(tokenizer.encode_prompt(row["text"].get<std::string>()) == prompt);
      CHECK(streamed(tokenizer, ids, false) == row["decoded"]);
    }
    for (const Json& row : variant["decode"]) {
      CAPTURE(row.dump());
      const Ids ids = row["ids"];
      CHECK(tokenizer.decode(ids) == row["text"]);
      CHECK(streamed(tokenizer, ids, false) == row["text"]);
      CHECK(streamed(tokenizer, ids, true) == row["without_special"]);
    }
  }
}

TEST_CASE("tokenizer: GPT-NeoX-20B gives the ids and texts of the Rust library") {
  const char* data = std::getenv("MAMBA_TEST_DATA");
  if (data == nullptr) {
    WARN("skipped: needs MAMBA_TEST_DATA");
    return;
  }
  const std::string folder = data;
  const Tokenizer tokenizer =
      Tokenizer::from_file(folder + "/tokenizers/gpt-neox-20b.tokenizer.json");
  const Json golden = read_json(folder + "/golden/neox_tokenizer.json");
  CHECK(golden.size() == 715);
  CHECK(tokenizer.vocab_size() == 50277);
  for (const Json& row : golden) {
    CAPTURE(row.dump());
    const Ids ids = row["ids"];
    CHECK(tokenizer.encode(row["text"].get<std::string>()) == ids);
    CHECK(tokenizer.decode(ids) == row["decoded"]);
    CHECK(streamed(tokenizer, ids, false) == row["decoded"]);
  }
}

// ---- words ----------------------------------------------------------------------------

TEST_CASE("tokenizer: words are the matches of GPT-2's pattern") {
  using Words = std::vector<std::string>;
  CHECK(words_of("low lower") == Words{"low", " lower"});
  CHECK(words_of("a  b") == Words{"a", " ", " b"});
  CHECK(words_of("a \n b") == Words{"a", " \n", " b"});
  CHECK(words_of("a\n\nb") == Words{"a", "\n", "\n", "b"});
  CHECK(words_of("a  ") == Words{"a", "  "});
  CHECK(words_of("\tx") == Words{"\t", "x"});
  CHECK(words_of(" ") == Words{" "});
  CHECK(words_of("it's") == Words{"it", "'s"});
  CHECK(words_of("it'S") == Words{"it", "'", "S"});
  CHECK(words_of("we'll've") == Words{"we", "'ll", "'ve"});
  CHECK(words_of("'lx 'll") == Words{"'", "lx", " '", "ll"});
  CHECK(words_of("!'s") == Words{"!'", "s"});
  CHECK(words_of("x'") == Words{"x", "'"});
  CHECK(words_of("ab12cd 34") == Words{"ab", "12", "cd", " 34"});
  CHECK(words_of("_-! ?") == Words{"_-!", " ?"});
  CHECK(words_of(u8"é½中 ²") == Words{u8"é", u8"½", u8"中", u8" ²"});
  CHECK(words_of(u8"e\u0301") == Words{"e", u8"\u0301"});        // a mark is no letter
  CHECK(words_of(u8"a\u3000b") == Words{"a", u8"\u3000", "b"});  // only U+0020 joins
  CHECK(words_of(u8"a\u3000\u3000b") == Words{"a", u8"\u3000", u8"\u3000", "b"});
  CHECK(words_of(std::string("a\0b", 3)) == Words{"a", std::string(1, '\0'), "b"});
}

TEST_CASE("tokenizer: what a pattern matches stands alone, is removed or goes to a neighbour") {
  using Words = std::vector<std::string>;
  CHECK(words_of("a--b-", "-", "Isolated") == Words{"a", "-", "-", "b", "-"});
  CHECK(words_of("a--b-", "-", "Removed") == Words{"a", "b"});
  CHECK(words_of("a--b-", "-", "Contiguous") == Words{"a", "--", "b", "-"});
  CHECK(words_of("a--b-", "-", "MergedWithPrevious") == Words{"a-", "-", "b-"});
  CHECK(words_of("a--b-", "-", "MergedWithNext") == Words{"a", "-", "-b", "-"});
  CHECK(words_of("aab", "(?=b)") == Words{"aa", "b"});  // an empty match splits as well
  CHECK(words_of(u8"é½", "") == Words{u8"é", u8"½"});
}

TEST_CASE("tokenizer: patterns mean what they mean to the Rust library, or are refused") {
  using Words = std::vector<std::string>;
  CHECK(words_of(u8"a\u180eb\u3000c", "\\s") == Words{u8"a\u180eb", u8"\u3000", "c"});
  CHECK(words_of("a\\s b", "\\\\s") == Words{"a", "\\s", " b"});
  CHECK(words_of(u8"IT'ſ 1234", "(?i:'s)|[^\\s\\p{L}\\p{N}]|\\p{N}{1,3}") ==
        Words{"IT", u8"'ſ", " ", "123", "4"});
  CHECK(words_of("x\ny", "^y|x$") == Words{"x", "\n", "y"});  // ^ and $ stand at lines
  for (const char* pattern :
       {"\\w", "[\\w]", "\\h", "\\b", "\\R", "\\C", "[a[b]]", "[a&&b]", "(?m:.)", "a{,2}",
        "a{1,2}+", "(*FAIL)", "(", "[", "a**", "\\", "(?<=a*)b", "\\1"}) {
    CAPTURE(pattern);
    CHECK_THROWS_AS(words_of("ab", pattern), std::runtime_error);
  }
}

TEST_CASE("tokenizer: a pattern that would not end is given up with one line") {
  Json file = bytes_only();
  file["pre_tokenizer"] = Json::parse(R"({"type": "Sequence", "pretokenizers": [
      {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": false},
      {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]})");
  CHECK(made(file).encode("xxyz") == ids_of("xxyz"));
  CHECK_THROWS_WITH(made(file).encode(std::string(60, 'x') + "z y"),
                    "a pattern takes too much time or memory on this text");
  file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(?:(x)|y)*z";
  CHECK_THROWS_AS(made(file).encode(std::string(1 << 24, 'x') + "z"), std::runtime_error);
}

TEST_CASE("tokenizer: a text that the file makes ever longer is given up with one line") {
  Json file = bytes_only();
  const Json twice = {{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aa"}};
  file["normalizer"] = {{"type", "Sequence"}, {"normalizers", Json(4, twice)}};
  CHECK(made(file).encode("a") == ids_of(std::string(16, 'a')));
  file["normalizer"]["normalizers"] = Json(1, twice);
  file["normalizer"]["normalizers"][0]["content"] = std::string(1 << 20, 'a');
  CHECK_THROWS_WITH(made(file).encode(std::string(1 << 11, 'a')),
                    "replacing makes a text of 1 GiB or more");
}

TEST_CASE("tokenizer: pre-tokenizers split and put a space in front as the file says") {
  Json file = with_merges({{"a", "Ġ"}, {"Ġ", "b"}, {"Ġ", "a"}});
  Json& pre_tokenizer = file["pre_tokenizer"];
  CHECK(made(file).encode("a b") == ids_of("a", 257));
  pre_tokenizer["use_regex"] = false;  // the text is one word
  CHECK(made(file).encode("a b") == ids_of(256, "b"));
  pre_tokenizer["add_prefix_space"] = true;
  CHECK(made(file).encode("a") == ids_of(258));
  CHECK(made(file).encode(" a") == ids_of(258));
  CHECK(made(file).encode("\na") == ids_of(" \na"));
  CHECK(made(file).encode("") == Ids{});
  const Json split = {{"type", "Split"},
                      {"pattern", {{"Regex", mamba::bpe::kGpt2Pattern}}},
                      {"behavior", "Isolated"},
                      {"invert", false}};
  pre_tokenizer = {{"type", "Sequence"}, {"pretokenizers", {split, pre_tokenizer}}};
  CHECK(made(file).encode("a b1") == ids_of(258, 257, " 1"));  // split first, then the spaces
  pre_tokenizer["pretokenizers"][0]["behavior"] = "Removed";
  pre_tokenizer["pretokenizers"][0]["invert"] = true;
  CHECK(made(file).encode("a b1") == ids_of(258, 257, " 1"));
}

// ---- merges ---------------------------------------------------------------------------

TEST_CASE("tokenizer: the worked example at the head of tokenizer.hpp") {
  const Tokenizer tokenizer =
      made(with_merges({{"e", "r"}, {"l", "o"}, {"lo", "w"}, {"Ġ", "low"}}));
  CHECK(tokenizer.encode("low lower") == ids_of(258, 259, 256));
  CHECK(tokenizer.id_of("Ġlow") == 259);
  CHECK(tokenizer.id_of("slow") == std::nullopt);
}

TEST_CASE("tokenizer: the best merge goes first, and the leftmost of equals") {
  CHECK(made(with_merges({{"a", "b"}, {"b", "c"}})).encode("abc") == ids_of(256, "c"));
  CHECK(made(with_merges({{"b", "c"}, {"a", "b"}})).encode("abc") == ids_of("a", 256));
  CHECK(made(with_merges({{"a", "a"}})).encode("aaa") == ids_of(256, "a"));
  CHECK(made(with_merges({{"a", "a"}, {"aa", "a"}})).encode("aaaaa") == ids_of(256, 257));
  // Listed twice, a merge has its later place.
  CHECK(made(with_merges({{"a", "b"}, {"b", "c"}, {"a", "b"}})).encode("abc") == ids_of("a", 257));
}

TEST_CASE("tokenizer: merges are read as strings and as pairs") {
  const Json pairs = with_merges({{"a", "b"}, {"ab", "Ġ"}});
  Json strings = pairs;
  strings["model"]["merges"] = {"#version: 0.2", "a b", "ab Ġ"};
  strings["pre_tokenizer"]["use_regex"] = false;
  CHECK(made(strings).encode("ab ab") == ids_of(257, 256));
  CHECK(made(pairs).encode("ab ab") == ids_of(256, " ", 256));
}

TEST_CASE("tokenizer: the queue of merges gives what the definition gives") {
  std::mt19937 bits(1);
  const auto below = [&](std::size_t n) { return bits() % n; };
  for (int round = 0; round < 60; ++round) {
    std::vector<std::string> tokens = {"a", "b", "c"};
    std::vector<std::pair<std::string, std::string>> merges;
    for (int i = 0; i < 20; ++i) {
      const std::string left = tokens[below(tokens.size())], right = tokens[below(tokens.size())];
      if (left.size() + right.size() > 12) continue;
      merges.emplace_back(left, right);
      tokens.push_back(left + right);
    }
    const Json file = with_merges(merges);
    const Tokenizer tokenizer = made(file);
    for (int n = 0; n < 50; ++n) {
      std::string text;
      std::vector<std::string> word;
      for (std::size_t length = below(200); length > 0; --length) {
        text += "abc"[below(3)];
        word.emplace_back(1, text.back());
      }
      for (bool merged = true; merged;) {                               // the definition
        std::pair<std::size_t, std::size_t> best = {merges.size(), 0};  // rank, place
        for (std::size_t i = 0; i + 1 < word.size(); ++i) {
          for (std::size_t r = merges.size(); r-- > 0;) {  // a repeated merge: its last rank
            if (merges[r].first != word[i] || merges[r].second != word[i + 1]) continue;
            best = std::min(best, {r, i});
            break;
          }
        }
        merged = best.first < merges.size();
        if (!merged) break;
        word[best.second] += word[best.second + 1];
        word.erase(word.begin() + static_cast<std::ptrdiff_t>(best.second) + 1);
      }
      Ids ids;
      for (const std::string& token : word) ids.push_back(file["model"]["vocab"][token]);
      CHECK(tokenizer.encode(text) == ids);
      CHECK(tokenizer.encode(text) == ids);  // as remembered
      CHECK(tokenizer.decode(ids) == text);
    }
  }
}

TEST_CASE("tokenizer: more words than it remembers") {
  const Tokenizer tokenizer = made(with_merges({{"1", "2"}, {"Ġ", "7"}}));
  std::string text;
  for (int i = 0; i < 70000; ++i) text += " " + std::to_string(i);
  const Ids ids = tokenizer.encode(text);
  CHECK(tokenizer.decode(ids) == text);
  CHECK(tokenizer.encode(text) == ids);
}

TEST_CASE("tokenizer: ignore_merges takes words that the vocabulary holds whole") {
  Json file = with_merges({{"a", "b"}, {"b", "c"}});
  file["model"]["vocab"]["Ġabc"] = 258;
  CHECK(made(file).encode(" abc") == ids_of(" ", 256, "c"));
  file["model"]["ignore_merges"] = true;
  CHECK(made(file).encode(" abc") == ids_of(258));
  CHECK(made(file).encode("abc") == ids_of(256, "c"));
}

TEST_CASE("tokenizer: bytes that the vocabulary lacks vanish or become unk_token") {
  Json file = with_merges({{"a", "b"}});
  file["model"]["vocab"].erase("x");
  CHECK(made(file).encode("axxb") == ids_of(256));  // so do the Rust library's neighbours meet
  CHECK(made(file).encode("xx") == Ids{});
  file["model"]["unk_token"] = "?";
  CHECK(made(file).encode("axxb") == ids_of("a??b"));
  file["model"]["unk_token"] = "<unk>";
  CHECK(made(file).encode("ab") == ids_of(256));
  const Tokenizer tokenizer = made(file);
  for (int i = 0; i < 2; ++i) {
    CHECK_THROWS_WITH(tokenizer.encode("x"), "the vocabulary lacks the unk_token <unk>");
  }
  file["model"]["unk_token"] = "?";
  file["model"]["fuse_unk"] = true;
  CHECK(made(file).encode("axxbx") == ids_of("a?b?"));
}

TEST_CASE("tokenizer: a megabyte without a word boundary takes no quadratic time") {
  const Tokenizer tokenizer = Tokenizer::from_file(root("weights/stories/tokenizer.json"));
  std::mt19937 bits(1);
  std::string letters, spaces(1 << 20, ' '), marks = "a";
  for (int i = 0; i < 1 << 20; ++i) letters += static_cast<char>('a' + bits() % 26);
  for (int i = 0; i < 1 << 19; ++i) marks += i % 2 == 0 ? u8"\u0301" : u8"\u0323";
  CHECK(tokenizer.decode(tokenizer.encode(letters)) == letters);
  CHECK(tokenizer.decode(tokenizer.encode(spaces)) == spaces);
  CHECK(tokenizer.decode(tokenizer.encode(marks)).size() == marks.size());  // a, U+0323: 3 bytes
}

// ---- added tokens ---------------------------------------------------------------------

TEST_CASE("tokenizer: added tokens are cut out leftmost first, the longest of them") {
  Json file = bytes_only();
  for (const char* content : {"<a>", "<a><b>", "<b>", "ab", "bcd"}) add_token(file, content);
  const Tokenizer tokenizer = made(file);
  CHECK(tokenizer.encode("x<a>y<b>") == ids_of("x", 256, "y", 258));
  CHECK(tokenizer.encode("<a><b><a><") == ids_of(257, 256, "<"));
  CHECK(tokenizer.encode("abcd") == ids_of(259, "cd"));
  CHECK(tokenizer.encode("<a") == ids_of("<a"));
  CHECK(tokenizer.id_of("<a><b>") == 257);
  CHECK(tokenizer.vocab_size() == 261);
}

TEST_CASE("tokenizer: added tokens are found in time that grows with the text alone") {
  Json file = bytes_only();
  const std::string many(255, 'a');
  add_token(file, many);
  add_token(file, many + "b", {"rstrip"});
  add_token(file, " ", {"lstrip", "rstrip"});
  const Tokenizer tokenizer = made(file);
  CHECK(tokenizer.encode(many.substr(1) + "c") == ids_of(many.substr(1) + "c"));
  CHECK(tokenizer.encode("a" + many + "b") == ids_of(256, "ab"));  // the leftmost, not the longest
  Ids ids;
  for (int i = 0; i < 10000; ++i) ids.push_back(256);
  CHECK(tokenizer.encode(std::string(2550000, 'a')) == ids);
  CHECK(tokenizer.encode("x" + std::string(1000000, ' ')) == ids_of("x", 258));
  add_token(file, "aa", {"single_word"});
  std::string rests;
  for (int i = 0; i < 1000; ++i) rests += many.substr(5) + " ";
  CHECK(made(file).encode(rests).size() > 250000);
  add_token(file, many + "bc");
  CHECK(error_of(file.dump()).find("entry 5: longer than 256 bytes: aaa") != std::string::npos);
}

TEST_CASE("tokenizer: lstrip, rstrip and single_word do what the Rust library does") {
  Json file = bytes_only();
  add_token(file, "<l>", {"lstrip"});
  add_token(file, "<r>", {"rstrip"});
  add_token(file, "<b>", {"lstrip", "rstrip"});
  add_token(file, "cat", {"single_word"});
  add_token(file, "\n");
  const Tokenizer tokenizer = made(file);
  CHECK(tokenizer.encode("a  <l>  b") == ids_of("a", 256, "  b"));
  CHECK(tokenizer.encode("a  <r>  b") == ids_of("a  ", 257, "b"));
  CHECK(tokenizer.encode(u8"a \u3000<b>\t b") == ids_of("a", 258, "b"));
  CHECK(tokenizer.encode("<r>  <l>  <b>") == ids_of(257, 256, 258));
  CHECK(tokenizer.encode("cat cats tomcat cat_ (cat)") ==
        ids_of(259, " cats tomcat cat_ (", 259, ")"));
  CHECK(tokenizer.encode(u8"écat cat½ catⓐ") == ids_of(u8"écat ", 259, u8"½ catⓐ"));
  // The search goes on inside the white space that <r> has swallowed.
  CHECK(tokenizer.encode("<r> \n ") == ids_of(257, 260, " "));
  file["added_tokens"].erase(4);
  add_token(file, " ", {"lstrip"});
  CHECK(made(file).encode("<r> b") == ids_of(257, "b"));  // <r> leaves nothing of it
}

TEST_CASE("tokenizer: normalized added tokens are sought in the normal form, others are not") {
  Json file = bytes_only();
  file["normalizer"] = {{"type", "NFC"}};
  add_token(file, u8"<e\u0301>", {"normalized"});
  add_token(file, u8"[e\u0301]");
  const Tokenizer tokenizer = made(file);
  CHECK(tokenizer.encode(u8"<é>") == ids_of(256));
  CHECK(tokenizer.encode(u8"<e\u0301>") == ids_of(256));
  CHECK(tokenizer.encode(u8"[é]") == ids_of(u8"[é]"));
  CHECK(tokenizer.encode(u8"[e\u0301]") == ids_of(257));
  // One that is not normalized is found first, wherever it stands.
  add_token(file, "aa", {"normalized"});
  add_token(file, "ab");
  CHECK(made(file).encode("aab") == ids_of("a", 259));
}

TEST_CASE("tokenizer: special tokens are not shown with skip_special_tokens") {
  Json file = bytes_only();
  add_token(file, "<s>", {"special"});
  add_token(file, "<t>");
  const Tokenizer tokenizer = made(file);
  CHECK(tokenizer.decode(ids_of("a", 256, "b", 257)) == "a<s>b<t>");
  CHECK(tokenizer.decode(ids_of("a", 256, "b", 257), true) == "ab<t>");
  CHECK(tokenizer.decode({97, -1, 258, 1 << 30, 98}) == "ab");  // no such ids
}

TEST_CASE("tokenizer: added tokens are decoded by the byte alphabet where they can be") {
  Json file = bytes_only();
  add_token(file, "Ġx");
  add_token(file, "a b");
  CHECK(made(file).decode({256, 257}) == " xa b");
}

// ---- Unicode --------------------------------------------------------------------------

TEST_CASE("tokenizer: NFC where the file asks for it") {
  Json file = bytes_only();
  CHECK(made(file).encode(u8"e\u0301") == ids_of(u8"e\u0301"));
  file["normalizer"] = {{"type", "Sequence"}, {"normalizers", {{{"type", "NFC"}}}}};
  const Tokenizer tokenizer = made(file);
  CHECK(tokenizer.encode(u8"e\u0301") == ids_of(u8"é"));
  CHECK(tokenizer.encode(u8"xe\u0301\u0323y") == ids_of(u8"x\u1eb9\u0301y"));  // sorted
  CHECK(tokenizer.encode(u8"\u1100\u1161\u11a8") == ids_of(u8"\uac01"));
  CHECK(tokenizer.encode(u8"\u212b\u0958") == ids_of(u8"\u00c5\u0915\u093c"));
  CHECK(tokenizer.encode(u8"ab\u0301") == ids_of(u8"ab\u0301"));
  CHECK(tokenizer.encode(u8"é\u0301e\u0301") == ids_of(u8"é\u0301é"));
}

TEST_CASE("tokenizer: bytes that are not UTF-8 become U+FFFD, one for each broken beginning") {
  const Tokenizer tokenizer = made(bytes_only());
  const auto text_of = [&](const std::string& hex) {
    const std::string bytes = from_hex(hex);
    const std::string text = tokenizer.decode(ids_of(bytes));
    CHECK(tokenizer.encode(bytes) == ids_of(text));
    CHECK(streamed(tokenizer, ids_of(bytes), false) == text);
    return text;
  };
  const std::string bad = u8"\ufffd";
  CHECK(text_of("61ff62") == "a" + bad + "b");
  CHECK(text_of("c3") == bad);
  CHECK(text_of("c328") == bad + "(");
  CHECK(text_of("c0af") == bad + bad);                  // overlong
  CHECK(text_of("e08080") == bad + bad + bad);          // overlong
  CHECK(text_of("eda080") == bad + bad + bad);          // a surrogate
  CHECK(text_of("f4908080") == bad + bad + bad + bad);  // above U+10FFFF
  CHECK(text_of("e282") == bad);                        // cut off
  CHECK(text_of("f09f99e29c93") == bad + u8"✓");
  CHECK(text_of("f09f9982") == u8"🙂");
}

TEST_CASE("tokenizer: what decodes from an encoding is the text") {
  const Tokenizer tokenizer = made(with_merges({{"a", "b"}, {"Ã", "©"}}));
  std::mt19937 bits(1);
  for (int round = 0; round < 300; ++round) {
    std::string text;
    for (unsigned n = bits() % 30; n > 0; --n) {
      const char32_t code = bits() % 3 == 0 ? bits() % 0x110000 : bits() % 0x250;
      if (code < 0xD800 || code > 0xDFFF) mamba::bpe::append_character(code, text);
    }
    CHECK(tokenizer.decode(tokenizer.encode(text)) == text);
  }
}

TEST_CASE("tokenizer: streamed text is the decoded text, for any ids") {
  const Tokenizer tokenizer = Tokenizer::from_file(root("weights/stories/tokenizer.json"));
  std::mt19937 bits(1);
  for (int round = 0; round < 2000; ++round) {
    Ids ids(bits() % 12);
    for (Token& id : ids) id = static_cast<Token>(bits() % (round % 2 == 0 ? 257 : 5000));
    for (const bool skip : {false, true}) {
      CHECK(streamed(tokenizer, ids, skip) == tokenizer.decode(ids, skip));
    }
  }
}

// ---- broken files ---------------------------------------------------------------------

TEST_CASE("tokenizer: a broken or unsupported file ends in one line that names it") {
  const auto broken = [](const std::string& pointer, const Json& value) {
    Json file = with_merges({{"a", "b"}});
    add_token(file, "<s>");
    file[Json::json_pointer(pointer)] = value;
    return file.dump();
  };
  const auto without = [](const std::string& parent, const std::string& key) {
    Json file = with_merges({{"a", "b"}});
    add_token(file, "<s>");
    file[Json::json_pointer(parent)].erase(key);
    return file.dump();
  };
  Json file = bytes_only();
  add_token(file, "<s>");
  add_token(file, "<s>");
  const std::string twice = file.dump();
  const Json nothing;
  const std::string added = "/added_tokens/0";
  const std::pair<std::string, std::string> cases[] = {
      // file, what the line must say
      {"", "the file is empty"},
      {"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2113710\n",
       "Git LFS pointer; `git lfs pull`"},
      {"\n<!DOCTYPE html><html>", "a page of HTML"},
      {"{\"model\": 1e999}", "a number that is too large"},
      {"{\"model\" 1}", "an error at byte 10 of 11"},
      {"{", "JSON"},
      {"\xff\xfe", "JSON"},
      {"{\"a\": \"\xff\"}", "JSON"},
      {"{\"a\": \"\n\"}", "JSON"},
      {"[]", "model"},
      {"7", "model"},
      {"{}", "model"},
      {std::string(100000, '['), "JSON"},
      {std::string(100000, '[') + std::string(100000, ']'), "model"},
      {without("", "model"), "model"},
      {without("/model", "vocab"), "model: vocab: "},
      {without("/model", "merges"), "model: merges: "},
      {without(added, "id"), "added_tokens: entry 1: "},
      {without(added, "content"), "content: expected string, found null"},
      {without(added, "lstrip"), "lstrip: expected boolean, found null"},
      {broken("/model", nothing), "model"},
      {broken("/model", "BPE"), "model"},
      {broken("/model/type", "Unigram"), "only the type BPE"},
      {broken("/model/dropout", 0.1), "dropout"},
      {broken("/model/dropout", "x"), "model: "},
      {broken("/model/byte_fallback", true), "byte_fallback: not in model.vocab: <0x"},
      {broken("/model/byte_fallback", 1), "byte_fallback: expected boolean, found 1"},
      {broken("/model/end_of_word_suffix", "</w>"), "end_of_word_suffix"},
      {broken("/model/unk_token", 5), "model: unk_token: expected string, found 5"},
      {broken("/model/ignore_merges", "yes"), "expected boolean, found string"},
      {broken("/model/vocab", Json::array({1, 2})), "vocab: expected object, found array"},
      {broken("/model/vocab/x", -1), "expected a number from 0 to 4194303, found -1"},
      {broken("/model/vocab/x", 4194304), "found 4194304"},
      {broken("/model/vocab/x", 18446744073709551615u), "found 18446744073709551615"},
      {broken("/model/vocab/x", 1e300), "expected a number from 0"},
      {broken("/model/vocab/x", 1.5), "found 1.5"},
      {broken("/model/vocab/x", "5"), "found string"},
      {broken("/model/vocab/x", 97), "two tokens have the id 97"},
      {broken("/model/merges", 5), "model: merges: "},
      {broken("/model/merges", Json::object()), "model: merges: "},
      {broken("/model/merges/0", "a"), "expected two tokens, found a"},
      {broken("/model/merges/0", "a b c"), "expected two tokens"},
      {broken("/model/merges/0", ""), "expected two tokens"},
      {broken("/model/merges/0", 5), "found 5"},
      {broken("/model/merges/0", {"a", 5}), "found array"},
      {broken("/model/merges/0", {"a", "b", "c"}), "found array"},
      {broken("/model/merges/0", "a qq"), "not in model.vocab: qq"},
      {broken("/model/merges/0", "b a"), "not in model.vocab: ba"},
      {broken("/normalizer", {{"type", "Lowercase"}}), "normalizer: Lowercase: not supported"},
      {broken("/normalizer", "NFC"), "normalizer: expected object, found string"},
      {broken("/normalizer", Json::array()), "normalizer: "},
      {broken("/normalizer", {{"type", 5}}), "normalizer: type: expected string, found 5"},
      {broken("/normalizer", {{"type", "Sequence"}}), "normalizers: expected array, found null"},
      {broken("/normalizer", {{"type", "Sequence"}, {"normalizers", 5}}), "normalizer: "},
      {broken("/normalizer", {{"type", "Prepend"}}), "Prepend: prepend: expected string"},
      {broken("/normalizer", {{"type", "Replace"}, {"content", ""}}), "Replace: expected object"},
      {broken("/normalizer", {{"type", "Replace"}, {"pattern", {{"Regex", "("}}}, {"content", ""}}),
       "Replace: the pattern is wrong at byte 1: "},
      {broken("/normalizer", {{"type", "NFKC"}}), "normalizer: NFKC: not supported"},
      {broken("/normalizer", {{"type", "Strip"}}), "normalizer: Strip: not supported"},
      {broken("/pre_tokenizer/type", "BertPreTokenizer"),
       "pre_tokenizer: BertPreTokenizer: not supp"},
      {broken("/pre_tokenizer/add_prefix_space", 1), "expected boolean, found 1"},
      {broken("/pre_tokenizer", {{"type", "Digits"}}), "Digits: individual_digits: expected"},
      {broken("/pre_tokenizer", {{"type", "Metaspace"}, {"replacement", "ab"}}),
       "Metaspace: only the replacement ▁ is supported"},
      {broken("/pre_tokenizer",
              {{"type", "Metaspace"}, {"replacement", "▁"}, {"prepend_scheme", "last"}}),
       "Metaspace: not supported: last"},
      {broken("/decoder", {{"type", "Metaspace"}}), "decoder: Metaspace: not supported"},
      {broken("/pre_tokenizer", {{"type", "Split"}, {"behavior", "Kept"}}), "the behavior Kept is"},
      {broken("/pre_tokenizer", Json::parse(R"({"type": "Split", "behavior": "Isolated",
                "pattern": {"Regex": "[a&&b]"}, "invert": false})")),
       "Split: the pattern is not supported from here: [a&&b]"},
      {broken("/decoder/type", "WordPiece"), "decoder: WordPiece: not supported"},
      {broken("/decoder", Json::parse(R"({"type": "Sequence", "decoders": [{"type": "Fuse"},
                {"type": "ByteFallback"}]})")),
       "decoder: ByteFallback: not supported at this place"},
      {broken("/decoder", Json::parse(R"({"type": "Sequence", "decoders": [
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}]})")),
       "decoder: Strip: only supported once, at the start"},
      {broken("/decoder", Json::parse(R"({"type": "Sequence", "decoders": [
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": -1, "stop": 0}]})")),
       "decoder: Strip: only supported once, at the start"},
      {broken("/decoder", {{"type", "Strip"}}), "decoder: Strip: only supported behind Fuse"},
      {broken("/decoder", Json::parse(R"({"type": "Sequence", "decoders": [
                {"type": "ByteFallback"}, {"type": "ByteFallback"}]})")),
       "decoder: ByteFallback: not supported at this place"},
      {broken("/post_processor", {{"type", "Other"}}), "post_processor: Other: not supported"},
      {broken("/post_processor", {{"type", "TemplateProcessing"}, {"single", Json::array()}}),
       "single: expected one Sequence, A"},
      {broken("/post_processor", Json::parse(R"({"type": "TemplateProcessing", "single":
                [{"Sequence": {"id": "B"}}]})")),
       "single: expected one Sequence, A"},
      {broken("/post_processor", Json::parse(R"({"type": "TemplateProcessing", "single":
                [{"SpecialToken": {"id": "x"}}], "special_tokens": {}})")),
       "expected object, found null"},
      {broken("/added_tokens", 5), "added_tokens"},
      {broken("/added_tokens/0", 5), "added_tokens: entry 1: "},
      {broken(added + "/id", -1), "added_tokens: entry 1: id: expected a number"},
      {broken(added + "/id", 258), "expected id 257, found 258: <s>"},
      {broken(added + "/content", "a"), "expected id 97, found 257: a"},
      {broken(added + "/content", 5), "content: expected string, found 5"},
      {broken(added + "/special", "no"), "special: expected boolean, found string"},
      {twice, "the same token again: <s>"},
  };
  for (const auto& [text, expected] : cases) {
    CAPTURE(text.substr(0, 200), expected);
    const std::string line = error_of(text);
    CHECK(line.rfind("tokenizer: some.json: ", 0) == 0);
    CAPTURE(line);
    CHECK(line.find(expected) != std::string::npos);
    CHECK(line.find("json.exception") == std::string::npos);
    CHECK(line.find('\n') == std::string::npos);
  }
  std::string nested = broken("/normalizer", "here");
  std::string sequences;
  for (int i = 0; i < 100000; ++i) sequences += "{\"type\":\"Sequence\",\"normalizers\":[";
  for (int i = 0; i < 100000; ++i) sequences += "]}";
  nested.replace(nested.find("\"here\""), 6, sequences);
  CHECK(error_of(nested).find("too many Sequences") != std::string::npos);
}

TEST_CASE("tokenizer: a file that is not there or a folder ends in one line") {
  for (const std::string& path : {root("no/such/file"), root("tests")}) {
    CHECK_THROWS_WITH(Tokenizer::from_file(path), "tokenizer: " + path + ": cannot be read");
  }
}

TEST_CASE("tokenizer: damaged files load or throw, whatever the damage") {
  Json file = with_merges({{"a", "b"}, {"ab", "c"}});
  add_token(file, "<s>", {"normalized", "lstrip"});
  file["normalizer"] = {{"type", "NFC"}};
  const std::string text = file.dump();
  for (std::size_t size = 0; size < text.size(); size += 7) {
    CHECK(error_of(text.substr(0, size)) != "");
  }
  std::mt19937 bits(1);
  for (int round = 0; round < 2000; ++round) {
    std::string damaged = text;
    for (unsigned n = 1 + bits() % 3; n > 0; --n) {
      damaged[bits() % damaged.size()] =
          static_cast<char>(bits() % 2 == 0 ? bits() : "0\"{}[],:-"[bits() % 9]);
    }
    try {
      const Tokenizer tokenizer = Tokenizer::from_text(damaged, "damaged");
      tokenizer.decode(tokenizer.encode("ab <s>abc \xff"));
    } catch (const std::runtime_error&) {
    }
  }
  SUCCEED();
}
