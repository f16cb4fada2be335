"""F1 over tokens, English and Chinese: `qa_f1_score` and `qa_f1_zh_score` of LongBench.

As in THUDM/LongBench 2e00731 (LongBench/metrics.py).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from shadowkv_cli.tasks.longbench.packages import segment

CHINESE_PUNCTUATION = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: E501, RUF001
_REMOVE_ENGLISH = str.maketrans("", "", string.punctuation)
_REMOVE_CHINESE = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)


def normalize_answer(text: str) -> str:
    """Lower case without punctuation and articles, single spaces."""
    plain = text.lower().translate(_REMOVE_ENGLISH)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def normalize_zh_answer(text: str) -> str:
    """Lower case without punctuation and white space."""
    return "".join(text.lower().translate(_REMOVE_CHINESE).split())


def token_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two bags of tokens; 0 where they share none, so also where both are empty."""
    shared = sum((Counter(prediction) & Counter(reference)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(reference)
    return 2 * precision * recall / (precision + recall)


def qa_f1(prediction: str, reference: str) -> float:
    """F1 over the words of two English texts."""
    return token_f1(normalize_answer(prediction).split(), normalize_answer(reference).split())


def qa_f1_zh(prediction: str, reference: str) -> float:
    """F1 over the words that jieba finds. Raises ShadowKVError where jieba is not installed."""
    return token_f1(_chinese_words(prediction), _chinese_words(reference))


def _chinese_words(text: str) -> list[str]:
    words = (normalize_zh_answer(word) for word in segment(text))
    return [word for word in words if word]
