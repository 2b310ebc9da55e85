"""Operations: each with its definition in plain torch, and a faster equal where one exists."""
