// Integers that compare as the floating-point numbers they come from. Torch-free.
#pragma once
#include <cstdint>
#include <limits>

#include "csrc/common/numeric.h"

namespace mergeme {

// The key's type. -0 equals 0, and NaN is the largest, so that it is never passed over.
template <typename A>
struct KeyOf {
  using type = int32_t;
};
template <>
struct KeyOf<double> {
  using type = int64_t;
};
template <typename A>
using key_t = typename KeyOf<A>::type;

template <typename A>
inline constexpr key_t<A> kNanKey = std::numeric_limits<key_t<A>>::max();
template <typename A>
inline constexpr key_t<A> kTakenKey = std::numeric_limits<key_t<A>>::min();  // below -inf's key

template <typename A>
MERGEME_HD key_t<A> order_key(A x) {
  using Key = key_t<A>;
  const Key bits = static_cast<Key>(bits_of(x + A(0)));  // -0 becomes 0
  const Key key = bits ^ (bits < 0 ? std::numeric_limits<Key>::max() : Key(0));
  return x != x ? kNanKey<A> : key;
}

// The number a key comes from.
template <typename A>
MERGEME_HD A number_of(key_t<A> key) {
  using Key = key_t<A>;
  const Key bits = key ^ (key < 0 ? std::numeric_limits<Key>::max() : Key(0));
  if constexpr (sizeof(A) == 8)
    return double_of(static_cast<uint64_t>(bits));
  else
    return float_of(static_cast<uint32_t>(bits));
}

}  // namespace mergeme
