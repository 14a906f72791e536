"""Written-out arithmetic: one small fact a line, digits from the right, so that every step is a look-up."""


def digits(number: int) -> str:
    """A number's digits from the right, ``"521"`` for 125, spaced."""
    return " ".join(reversed(str(number)))


def addition(a: int, b: int) -> str:
    """Adds column by column with a carry."""
    x, y = str(a)[::-1], str(b)[::-1]
    carry, lines = 0, [f"{digits(a)} and {digits(b)}"]
    for i in range(max(len(x), len(y))):
        p, q = (int(text[i]) if i < len(text) else 0 for text in (x, y))
        total = p + q + carry
        lines.append(f"{p}+{q}+{carry}={total}, write {total % 10} carry {total // 10}")
        carry = total // 10
    if carry:
        lines.append(f"write {carry}")
    return "\n".join([*lines, f"result {a + b}"])


def subtraction(a: int, b: int) -> str:
    """Subtracts column by column with a borrow; a negative result is found the other way round."""
    high, low = max(a, b), min(a, b)
    x, y = str(high)[::-1], str(low)[::-1]
    borrow, lines = 0, [f"{b} is more than {a}, so minus"] if a < b else []
    lines.append(f"{digits(high)} and {digits(low)}")
    for i in range(len(x)):
        p, q = int(x[i]), int(y[i]) if i < len(y) else 0
        rest = p - q - borrow
        lines.append(f"{p}-{q}-{borrow}: write {rest % 10} borrow {int(rest < 0)}")
        borrow = int(rest < 0)
    return "\n".join([*lines, f"result {a - b}"])


def by_digit(a: int, digit: int) -> str:
    """Multiplies a number by one digit."""
    carry, lines = 0, [f"{digits(a)} times {digit}"]
    for char in reversed(str(a)):
        product = int(char) * digit
        total = product + carry
        lines.append(f"{char}*{digit}={product}, +{carry}={total}, write {total % 10} carry {total // 10}")
        carry = total // 10
    if carry:
        lines.append(f"write {carry}")
    return "\n".join([*lines, f"result {a * digit}"])


def by_two_digits(a: int, b: int) -> str:
    """Multiplies by a two-digit number: by each digit, then the sum."""
    ones, tens = a * (b % 10), a * (b // 10)
    return f"{by_digit(a, b % 10)}\n{by_digit(a, b // 10)}, {tens * 10}\n{addition(ones, tens * 10)}"


def multiplication(a: int, b: int) -> str:
    """Multiplies; the longer number is written first, and one of the two has at most two digits."""
    high, low = max(a, b), min(a, b)
    return by_digit(high, low) if low < 10 else by_two_digits(high, low)


def division(a: int, digit: int) -> str:
    """Divides by a small number, digit by digit from the left."""
    rest, lines = 0, []
    for char in str(a):
        part = rest * 10 + int(char)
        lines.append(f"{part}/{digit}={part // digit} rest {part % digit}")
        rest = part % digit
    return "\n".join([*lines, f"result {a // digit} rest {rest}"])


def running_sum(numbers: list[int]) -> str:
    """Adds several numbers one after the other."""
    total, parts = numbers[0], []
    for number in numbers[1:]:
        parts.append(addition(total, number))
        total += number
    return "\n".join(parts)
