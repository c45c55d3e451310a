#include "csrc/ptx/tokens.h"

#include <algorithm>
#include <cctype>
#include <charconv>

#include "csrc/ptx/literals.h"
#include "csrc/ptx/messages.h"
#include "csrc/ptx/parser.h"

namespace mergeme::ptx {
namespace {

bool is_digit(char c) { return std::isdigit(static_cast<unsigned char>(c)); }
bool is_word_character(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
         c == '.';
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(source) {}

  std::vector<Token> run() {
    while (skip_blanks()) {
      const size_t begin = at_;
      const char c = source_[at_];
      if (c == '"')
        string();
      else if (is_digit(c))
        finish(TokenKind::kNumber, begin, end_of_number());
      else if (is_word_character(c))
        finish(TokenKind::kWord, begin, end_of_word());
      else
        finish(TokenKind::kPunctuation, begin, at_ + 1);
    }
    tokens_.push_back({TokenKind::kEnd, "<end>", line_, at_, at_});
    return std::move(tokens_);
  }

 private:
  char ahead(size_t by) const { return at_ + by < source_.size() ? source_[at_ + by] : '\0'; }

  void finish(TokenKind kind, size_t begin, size_t end) {
    tokens_.push_back({kind, source_.substr(begin, end - begin), line_, begin, end});
    at_ = end;
  }

  // Blanks and comments; false at the end of the text.
  bool skip_blanks() {
    while (at_ < source_.size()) {
      if (source_[at_] == '/' && ahead(1) == '/') {
        at_ = std::min(source_.find('\n', at_), source_.size());
      } else if (source_[at_] == '/' && ahead(1) == '*') {
        const size_t end = std::min(source_.find("*/", at_ + 2), source_.size() - 2) + 2;
        line_ += static_cast<int>(std::count(source_.begin() + static_cast<long>(at_),
                                             source_.begin() + static_cast<long>(end), '\n'));
        at_ = end;
      } else if (std::isspace(static_cast<unsigned char>(source_[at_]))) {
        line_ += source_[at_++] == '\n';
      } else {
        return true;
      }
    }
    return false;
  }

  void string() {
    const size_t begin = at_++;
    while (at_ < source_.size() && source_[at_] != '"') at_ += source_[at_] == '\\' ? 2 : 1;
    at_ = std::min(at_ + 1, source_.size());
    tokens_.push_back(
        {TokenKind::kString, source_.substr(begin + 1, at_ - begin - 2), line_, begin, at_});
  }

  size_t end_of_number() const {
    const bool may_have_exponent = source_[at_] != '0';  // 0f3e800000 has none
    size_t end = at_;
    while (end < source_.size() && (is_word_character(source_[end]) && source_[end] != '_' &&
                                    source_[end] != '$' && source_[end] != '%')) {
      const bool exponent = source_[end] == 'e' || source_[end] == 'E';
      end++;
      if (exponent && may_have_exponent && end < source_.size() &&
          (source_[end] == '-' || source_[end] == '+'))
        end++;
    }
    return end;
  }

  // A word may hold double colons: shared::cta.
  size_t end_of_word() const {
    size_t end = at_;
    while (end < source_.size()) {
      if (is_word_character(source_[end]))
        end++;
      else if (source_.substr(end, 2) == "::" && end + 2 < source_.size() &&
               is_word_character(source_[end + 2]))
        end += 2;
      else
        break;
    }
    return end;
  }

  std::string_view source_;
  size_t at_ = 0;
  int line_ = 1;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(std::string_view source) { return Lexer(source).run(); }

const Token& TokenCursor::peek(size_t ahead) const {
  return tokens_[std::min(position_ + ahead, tokens_.size() - 1)];
}

const Token& TokenCursor::next() {
  const Token& token = peek();
  if (position_ + 1 < tokens_.size()) position_++;
  return token;
}

bool TokenCursor::is(std::string_view text) const {
  return peek().text == text && peek().kind != TokenKind::kString;
}

bool TokenCursor::accept(std::string_view text) {
  if (!is(text)) return false;
  next();
  return true;
}

void TokenCursor::expect(std::string_view text) {
  if (!accept(text)) fail(concat("expected '", text, "'"));
}

std::string_view TokenCursor::expect_word() {
  if (!is_word()) fail("expected a word");
  return next().text;
}

void TokenCursor::skip_past(std::string_view text) {
  while (!accept(text)) {
    if (at_end()) fail(concat("expected '", text, "'"));
    next();
  }
}

int64_t TokenCursor::constant() {
  int64_t value = constant_term();
  while (true) {
    if (accept("+"))
      value += constant_term();
    else if (accept("-"))
      value -= constant_term();
    else if (accept("*"))
      value *= constant_term();
    else
      return value;
  }
}

int64_t TokenCursor::constant_term() {
  if (accept("-")) return -constant_term();
  if (accept("(")) {
    const int64_t value = constant();
    expect(")");
    return value;
  }
  if (peek().kind != TokenKind::kNumber) fail("expected a constant");
  return static_cast<int64_t>(parse_literal(next().text).integer);
}

int64_t TokenCursor::offset() {
  int64_t total = 0;
  while (true) {
    if (accept("+"))
      total += constant_term();
    else if (accept("-"))
      total -= constant_term();
    else
      return total;
  }
}

void TokenCursor::fail(std::string_view message) const {
  throw Error(concat("PTX parse error at line ", peek().line, ": ", message, " (near '",
                     peek().text, "')"));
}

}  // namespace mergeme::ptx
