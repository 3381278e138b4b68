"""What a disk does to a file: each is a function of its content and of where it happens."""

PAGE = 4096


def half(content: bytes, place: int) -> bytes:
    return content[: len(content) // 2]


def zeroed_page(content: bytes, place: int) -> bytes:
    start = place - place % PAGE
    zeros = bytes(min(PAGE, len(content) - start))
    return content[:start] + zeros + content[start + PAGE :]


def flipped_byte(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


DAMAGES = {"half": half, "zeroed page": zeroed_page, "flipped byte": flipped_byte}
