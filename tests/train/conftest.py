"""A small random model and small batches to train it on."""

from dataclasses import dataclass, field

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from minilm.config import EncodingConfig, MiniLMConfig
from minilm.encoder import SentenceEncoder
from minilm.model import MiniLM
from minilm.train import distributed
from minilm.train.objectives import Contrastive
from minilm.train.settings import TrainingSettings
from minilm.train.trainer import Trainer
from minilm.weights.checkpoint import Checkpoint

SUBJECTS = ("a man", "a woman", "the dog", "the cat", "some child", "an old bird")
VERBS = ("eats", "sees", "likes", "finds", "carries")
OBJECTS = ("bread", "a stone", "the red ball", "a very long green rope", "water")
TEXTS = [f"{s} {v} {o}" for s in SUBJECTS for v in VERBS for o in OBJECTS]
WORDS = sorted({word for text in TEXTS for word in text.split()})
RUN = """
[model]
name = "{folder}/start"
[objective]
name = "{objective}"
[data]
folder = "{folder}"
batch_size = 6
on_leak = "{on_leak}"
[[data.sources]]
path = "texts.txt"
columns = {{text = "text"}}
[teacher]
names = ["{folder}/teacher"]
cache = "{folder}/vectors"
dtype = "float32"
[evaluation]
data = "{folder}/sts"
[training]
output = "{folder}/run"
epochs = 2
learning_rate = 1e-3
evaluate_every = 3
log_every = 1
"""


def tiny_encoder(dropout=0.1, seed=0, **encoding):
    """Make a random encoder of two layers whose vocabulary is the words above."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    sizes = {"vocab_size": len(vocabulary), "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    sizes |= {"feed_forward_size": 64, "max_positions": 64}
    config = MiniLMConfig(**sizes, hidden_dropout=dropout, attention_dropout=dropout)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tensors = {name: tensor.clone() for name, tensor in MiniLM(config, "torch").state_dict().items()}
        for name, tensor in tensors.items():
            if "norm" not in name and tensor.dim() > 1:
                torch.nn.init.normal_(tensor, std=0.3)
    checkpoint = Checkpoint(config, EncodingConfig(**{"max_seq_length": 16, **encoding}), tensors, tokenizer.to_str())
    return SentenceEncoder(checkpoint)


@dataclass
class Rows:
    """Batches of pairs (or triplets) of texts that share their beginning, in an order of its own each epoch."""

    batch_size: int = 6
    count: int = 5
    negatives: int = 0
    seed: int = 0
    position: int = field(default=0, init=False)

    def __len__(self):
        return self.count

    def __iter__(self):
        for _ in range(self.count - self.position % self.count):
            generator = torch.Generator().manual_seed(self.seed + self.position)
            rows = torch.randperm(len(TEXTS), generator=generator)[: self.batch_size].tolist()
            self.position += 1
            own = distributed.share(len(rows))
            yield self.batch(rows[own], len(rows))

    def batch(self, rows, total):
        texts = {
            "query": [TEXTS[i] for i in rows],
            "positive": [TEXTS[(i // 5) * 5 + (i + 1) % 5] for i in rows],
            "text": [TEXTS[i] for i in rows],
        }
        if self.negatives:
            texts["negatives"] = [[TEXTS[(i * 7 + j) % len(TEXTS)] for j in range(self.negatives)] for i in rows]
        generator = torch.Generator().manual_seed(1)
        teacher = torch.randn(len(TEXTS), 8, generator=generator)[rows]
        return TextBatch(texts, {"teacher": teacher}, total)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@dataclass
class TextBatch:
    texts: dict
    targets: dict
    total: int


@pytest.fixture(name="tiny_encoder")
def _tiny_encoder():
    return tiny_encoder


@pytest.fixture
def make_rows():
    return Rows


@pytest.fixture
def train(tmp_path):
    """Return a function that trains a small encoder on pairs, and gives the trainer and its result."""

    def run(encoder=None, objective=None, evaluate=None, name="run", **settings):
        settings = {"learning_rate": 1e-3, "plot": False, "log_every": 1, **settings}
        chosen = TrainingSettings(str(tmp_path / name), **settings)
        objective = objective or Contrastive(0.1, hard_negatives=False)
        trainer = Trainer(encoder or tiny_encoder(), objective, Rows(), chosen, evaluate)
        return trainer, trainer.run()

    return run


@pytest.fixture
def prepared(tmp_path, write_sts):
    """A start, a teacher, training texts and STS data; give a function that writes a recipe for them."""
    tiny_encoder(dropout=0.0).save(tmp_path / "start")
    tiny_encoder(dropout=0.0, seed=1).save(tmp_path / "teacher")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:30]) + "\n")
    write_sts(tmp_path / "sts", TEXTS[30:])

    def write(objective, on_leak="error"):
        path = tmp_path / f"{objective}.toml"
        path.write_text(RUN.format(folder=tmp_path, objective=objective, on_leak=on_leak))
        return path

    return write
