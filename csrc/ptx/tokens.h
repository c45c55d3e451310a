// A PTX text as tokens, and a cursor over them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mergeme::ptx {

enum class TokenKind : uint8_t { kWord, kNumber, kPunctuation, kString, kEnd };

struct Token {
  TokenKind kind;
  std::string_view text;  // of the source, without a string's quotes
  int line;
  size_t begin;
  size_t end;
};

// The tokens of a text that outlives them; a token of kind kEnd comes last.
std::vector<Token> tokenize(std::string_view source);

class TokenCursor {
 public:
  explicit TokenCursor(std::string_view source) : source_(source), tokens_(tokenize(source)) {}

  const Token& peek(size_t ahead = 0) const;
  const Token& next();
  bool at_end() const { return peek().kind == TokenKind::kEnd; }
  bool is(std::string_view text) const;
  bool is_word() const { return peek().kind == TokenKind::kWord; }
  // A word that begins with a dot: a directive, a type or an attribute.
  bool is_directive() const { return is_word() && peek().text.front() == '.'; }
  bool accept(std::string_view text);
  void expect(std::string_view text);
  std::string_view expect_word();
  void skip_past(std::string_view text);
  // A constant expression of integers.
  int64_t constant();
  // One term of it: a number, a negated term or an expression in parentheses.
  int64_t constant_term();
  // The "+ 8 - 4" after an address; 0 if there is none.
  int64_t offset();
  std::string_view source(size_t begin, size_t end) const {
    return source_.substr(begin, end - begin);
  }
  size_t last_end() const { return tokens_[position_ - 1].end; }
  [[noreturn]] void fail(std::string_view message) const;

 private:
  std::string_view source_;
  std::vector<Token> tokens_;
  size_t position_ = 0;
};

}  // namespace mergeme::ptx
