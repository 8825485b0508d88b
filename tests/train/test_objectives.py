"""Objectives: what they ask of a batch, what they compute of it, what they remember, and that it can be kept."""

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from scipy import linalg

from minilm.train import losses
from minilm.train.distillation import (
    CRD,
    HPD,
    IBKD,
    MSE,
    IBKDFineTuning,
    MemoryBank,
    SimilarityDistillation,
    principal_components,
    projection,
)
from minilm.train.objectives import (
    Contrastive,
    CoSENT,
    CosineRegression,
    Matryoshka,
    Objective,
    Ranking,
    UnsupervisedSimCSE,
)
from minilm.train.states import StatePooler

ROWS, WIDTH, TEACHER_WIDTH, NEGATIVES = 4, 6, 9, 2
SAMPLE = {"teacher": torch.randn(40, TEACHER_WIDTH, generator=torch.Generator().manual_seed(7))}
STATES = {"embedding": torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(8))}


def fitted_hpd():
    objective = HPD(WIDTH, TEACHER_WIDTH, output_width=3)
    objective.prepare({"text": STATES}, SAMPLE)
    return objective


OBJECTIVES = {
    "UnsupervisedSimCSE": UnsupervisedSimCSE,
    "Contrastive": Contrastive,
    "Contrastive, pairs": lambda: Contrastive(hard_negatives=False, symmetric=True),
    "Ranking": Ranking,
    "CosineRegression": CosineRegression,
    "CoSENT": CoSENT,
    "Matryoshka": lambda: Matryoshka(Contrastive(), widths=(6, 3), weights=(1, 0.5)),
    "MSE": lambda: MSE(WIDTH, TEACHER_WIDTH),
    "HPD": fitted_hpd,
    "SimilarityDistillation": lambda: SimilarityDistillation(temperature=0.2, kl_weight=0.5, stretch=1.5),
    "CRD": lambda: CRD(WIDTH, TEACHER_WIDTH, projection_width=5, bank_size=6),
    "IBKD": lambda: IBKD(WIDTH, TEACHER_WIDTH, temperature=0.5, gamma=0.1, bank_size=6),
    "IBKDFineTuning": lambda: IBKDFineTuning(WIDTH, projection_width=4),
}
each_objective = pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)


def batch_for(objective, seed=0, dtype=torch.float32, rows=ROWS):
    """Random vectors (normalised, where that is what is asked for) and targets for an objective."""
    generator = torch.Generator().manual_seed(seed)

    def vectors(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def state(column, name):
        extra = [NEGATIVES] if column == "negatives" else [objective.views] if objective.views > 1 else []
        x = vectors(rows, *extra, WIDTH)
        return (F.normalize(x, dim=-1) if name == "embedding" else x).to(dtype).requires_grad_()

    targets = {"score": torch.rand(rows, generator=generator), "teacher": vectors(rows, TEACHER_WIDTH).to(dtype)}
    texts = {column: {name: state(column, name) for name in objective.states} for column in objective.columns}
    return texts, {name: targets[name] for name in objective.targets}


def leaves(texts):
    return [x for column in texts.values() for x in column.values()]


def expected_value(name, objective, texts, targets):
    """The loss that each objective stands for, of vectors picked by hand; a bank is empty yet."""
    e = {column: states.get("embedding") for column, states in texts.items()}
    z = {column: states.get("unnormalized") for column, states in texts.items()}
    teacher = targets.get("teacher")
    if name == "UnsupervisedSimCSE":
        return losses.simcse_unsupervised(e["text"][:, 0], e["text"][:, 1])
    if name == "Contrastive":
        return losses.simcse_supervised(e["query"], e["positive"], e["negatives"])
    if name == "Contrastive, pairs":
        return losses.info_nce(e["query"], e["positive"], symmetric=True)
    if name == "Ranking":
        passages = [p for i in range(ROWS) for p in (e["positive"][i], *e["negatives"][i])]
        return losses.ranking(e["query"], torch.stack(passages))
    if name in ("CosineRegression", "CoSENT"):
        loss = losses.cosent if name == "CoSENT" else losses.cosine_regression
        return loss(e["sentence1"], e["sentence2"], targets["score"])
    if name == "Matryoshka":
        parts = [losses.info_nce(*(x[..., :width] for x in e.values())) for width in (6, 3)]
        return parts[0] + 0.5 * parts[1]
    if name == "MSE":
        return (e["text"] @ objective.projection.weight.T - teacher).square().mean()
    if name == "HPD":
        return (e["text"] @ objective.output_layer.weight.T - teacher @ objective.components.T).square().mean()
    if name == "SimilarityDistillation":
        divergence = losses.similarity_kl(e["text"], teacher, temperature=0.2, stretch=1.5)
        return losses.similarity_squared_error(e["text"], teacher, stretch=1.5) + 0.5 * divergence
    if name == "CRD":
        a, b = z["text"] @ objective.student_projection.weight.T, teacher @ objective.teacher_projection.weight.T
        return losses.crd(a, b, losses.crd_log_constant(a, b)) + losses.crd(b, a, losses.crd_log_constant(b, a))
    if name == "IBKD":
        contrastive = losses.info_nce(z["text"] @ objective.projection.weight.T, teacher, temperature=0.5)
        return contrastive + 0.2 * losses.hsic(texts["text"]["layer.0"], z["text"], 0.1)
    weight = objective.projection.weight
    contrastive = losses.simcse_supervised(*(x @ weight.T for x in z.values()))
    early, late = (torch.cat([c[s].reshape(-1, WIDTH) for c in texts.values()]) for s in ("layer.5", "unnormalized"))
    return contrastive + losses.hsic(early, late, 0.1)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_is_the_loss_it_stands_for(name):
    objective = OBJECTIVES[name]()
    texts, targets = batch_for(objective)
    expected = expected_value(name, objective, texts, targets)
    assert objective(texts, targets).item() == pytest.approx(expected.item(), rel=1e-5)


@each_objective
def test_gradient(make):
    objective = make().double()
    texts, targets = batch_for(objective, dtype=torch.float64)
    objective(texts, targets)  # something is in the banks now
    objective.eval()
    parameters = list(objective.parameters())
    columns = [(column, name) for column in texts for name in texts[column]]

    def value(*given):
        rebuilt = {column: {} for column in texts}
        for (column, name), vectors in zip(columns, given, strict=True):
            rebuilt[column][name] = vectors
        return objective(rebuilt, targets)

    assert torch.autograd.gradcheck(value, leaves(texts))
    for gradient in torch.autograd.grad(value(*leaves(texts)), [*leaves(texts), *parameters]):
        assert gradient.abs().max() > 0


@each_objective
def test_a_resumed_run_goes_on_as_it_was(make):
    torch.manual_seed(0)
    first = make()
    for seed in range(3):
        first(*batch_for(first, seed))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    second = make()
    second.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(3, 6):
        values = [objective(*batch_for(objective, seed)).item() for objective in (first, second)]
        assert values[0] == values[1]
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


@each_objective
def test_starts_from_torchs_generator_and_leaves_it_alone_later(make):
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        starts.append(make())
    before = torch.get_rng_state()
    values = [objective(*batch_for(objective)).item() for objective in starts]
    assert torch.equal(before, torch.get_rng_state())
    assert values[0] == values[1]
    if any(True for _ in starts[0].parameters()) and not isinstance(starts[0], HPD):  # which was prepared
        assert values[0] != values[2]


@each_objective
def test_evaluation_mode_remembers_nothing(make):
    objective = make().eval()
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    values = [objective(*batch_for(objective)).item() for _ in range(2)]
    assert values[0] == values[1]
    for name, tensor in objective.state_dict().items():
        assert torch.equal(tensor, before[name]) or (tensor.isnan().all() and before[name].isnan().all())


@each_objective
def test_narrow_vectors_and_autocast(make):
    objective = make().eval()
    texts, targets = batch_for(objective, dtype=torch.bfloat16)
    wide = {column: {name: x.detach().float() for name, x in states.items()} for column, states in texts.items()}
    with torch.autocast("cpu", torch.bfloat16):
        value = objective(texts, targets)
    assert value.dtype == torch.float32
    assert value.item() == objective(wide, {name: x.float() for name, x in targets.items()}).item()


@each_objective
def test_learns(make):
    objective = make()
    texts, targets = batch_for(objective, seed=3)
    optimizer = torch.optim.Adam([*leaves(texts), *objective.parameters()], lr=0.02)
    values = []
    for _ in range(60):
        value = objective.eval()(texts, targets)
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert values[-1] < 0.9 * values[0]


# Distillation


def test_principal_components_are_those_of_a_singular_value_decomposition():
    sample = SAMPLE["teacher"].numpy() * np.arange(1, TEACHER_WIDTH + 1)
    expected = np.linalg.svd(sample - sample.mean(axis=0))[2][:4]
    components = principal_components(torch.tensor(sample), 4).numpy()
    assert np.abs(np.sum(components * expected, axis=1)) == pytest.approx(np.ones(4), abs=1e-6)
    assert components @ components.T == pytest.approx(np.eye(4), abs=1e-9)
    assert (components.max(axis=1) == np.abs(components).max(axis=1)).all()


def test_hpd_gives_the_narrow_vectors():
    objective = fitted_hpd()
    assert objective.output_layer.weight.shape == (3, WIDTH)
    assert objective.output_layer.bias is None
    assert MSE(WIDTH, TEACHER_WIDTH).output_layer is None


def test_hpd_must_be_fitted_first():
    objective = HPD(WIDTH, TEACHER_WIDTH, output_width=3)
    with pytest.raises(ValueError, match="a fitted PCA: call prepare"):
        objective(*batch_for(objective))
    for shape in ((2, TEACHER_WIDTH), (40, TEACHER_WIDTH + 1), (40,)):
        with pytest.raises(ValueError, match="at least 3 teacher vectors of width 9, got shape"):
            objective.prepare({"text": STATES}, {"teacher": torch.ones(shape)})


@pytest.mark.parametrize("outputs", [3, WIDTH, TEACHER_WIDTH])
def test_projections_start_orthonormal(outputs):
    weight = projection(WIDTH, outputs).weight
    gram = weight.T @ weight if outputs >= WIDTH else weight @ weight.T
    assert torch.allclose(gram, torch.eye(len(gram)), atol=1e-6)


def test_crd_keeps_the_constants_of_its_first_batch():
    objective = OBJECTIVES["CRD"]()
    objective(*batch_for(objective, 0))
    constants = objective.log_constants.clone()
    assert constants.isfinite().all()
    texts, targets = batch_for(objective, 1)
    a, b = objective.student_projection(texts["text"]["unnormalized"]), objective.teacher_projection(targets["teacher"])
    a_bank, b_bank = objective.bank().clone().chunk(2, dim=1)
    forth = losses.crd(a, torch.cat([b, b_bank]), constants[0])
    back = losses.crd(b, torch.cat([a, a_bank]), constants[1])
    assert objective(texts, targets).item() == pytest.approx((forth + back).item(), rel=1e-6)
    assert torch.equal(objective.log_constants, constants)


def test_ibkd_takes_negatives_from_its_bank_but_not_the_same_texts():
    objective = OBJECTIVES["IBKD"]()
    texts, targets = batch_for(objective, 0)
    alone = objective(texts, targets).item()
    assert len(objective.bank()) == ROWS
    assert objective.eval()(texts, targets).item() == alone  # the bank holds these very texts
    others = batch_for(objective, 1)[1]["teacher"]
    objective.bank.remember(others[:2])
    z = objective.projection(texts["text"]["unnormalized"])
    more = losses.info_nce(z, targets["teacher"], others[:2], 0.5) - losses.info_nce(z, targets["teacher"], None, 0.5)
    assert objective(texts, targets).item() == pytest.approx(alone + more.item(), rel=1e-5)
    assert more > 0


def test_memory_bank_keeps_the_last_rows():
    bank = MemoryBank(5, 1)
    assert bank().shape == (0, 1)
    for start in (0, 3, 6):
        bank.remember(torch.arange(start, start + 3.0).unsqueeze(1))
        kept = range(max(0, start - 2), start + 3)
        assert sorted(bank().flatten().tolist()) == list(kept)
    bank.remember(torch.arange(100.0, 112).unsqueeze(1))  # more than it can hold
    assert sorted(bank().flatten().tolist()) == [107, 108, 109, 110, 111]


def test_memory_bank_of_size_0_stays_empty():
    bank = MemoryBank(0, 3)
    bank.remember(torch.ones(2, 3))
    assert bank().shape == (0, 3)
    assert bank.without(torch.ones(2, 3)).shape == (0, 3)


def test_a_bank_may_change_while_a_graph_waits():
    objective = OBJECTIVES["CRD"]()
    batches = [batch_for(objective, seed) for seed in range(3)]
    total = sum(objective(*batch) for batch in batches)  # the bank is overwritten before backward
    total.backward()
    assert all(x.grad.abs().max() > 0 for texts, _ in batches for x in leaves(texts))


# What makes no sense

BAD_SETTINGS = {
    "temperature": (lambda: Contrastive(temperature=0), "temperature must be positive, got 0"),
    "infinite temperature": (lambda: CoSENT(temperature=math.inf), "temperature must be positive, got inf"),
    "simcse": (lambda: UnsupervisedSimCSE(temperature=-1), "temperature must be positive, got -1"),
    "gamma": (lambda: IBKD(6, 9, gamma=0), "gamma must be positive, got 0"),
    "bank": (lambda: CRD(6, 9, bank_size=-1), "bank_size must be at least 0, got -1"),
    "width": (lambda: Matryoshka(MSE(6, 9)), "works at any width, but projection.weight is of one width"),
}


@pytest.mark.parametrize(("make", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings_are_refused_before_training(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_a_batch_lacks_is_named():
    objective = Contrastive()
    texts, targets = batch_for(objective)
    del texts["negatives"]
    with pytest.raises(ValueError, match=r"Contrastive needs texts\['negatives'\]\['embedding'\]; the batch lacks"):
        objective(texts, targets)
    with pytest.raises(ValueError, match=r"MSE needs targets\['teacher'\]"):
        MSE(6, 9)({"text": {"embedding": torch.ones(2, 6)}}, {})


STARTS = {
    "MSE": (lambda c, d: MSE(c, d), "projection"),
    "HPD": (lambda c, d: HPD(c, d, output_width=c // 2), "output_layer"),
    "CRD": (lambda c, d: CRD(c, d, projection_width=c), "student_projection"),
    "IBKD": (lambda c, d: IBKD(c, d), "projection"),
}


@pytest.mark.parametrize("name", STARTS)
def test_begins_where_the_student_is_nearest_to_the_teacher(name, tiny_encoder):
    """As scipy's orthogonal Procrustes finds it: cosines stay, and vectors come near the teacher's."""
    encoder, (make, layer) = tiny_encoder(dropout=0.0), STARTS[name]
    width = encoder.config.hidden_size
    objective = make(width, 2 * width)
    pooler = StatePooler(encoder, objective.states)
    words = ["a", "man", "the", "cat", "water", "dog", "eats", "bread", "old", "bird"]
    batches, places = pooler.pack([f"{a} {b} {c}" for a in words for b in words for c in words[:2]])
    with torch.no_grad():
        states = dict(zip(objective.states, pooler(batches[0])[places].unbind(1), strict=True))
    student = states["embedding" if "embedding" in states else "unnormalized"].double().numpy()
    hidden = np.random.default_rng(0).normal(size=(width, 2 * width))  # the teacher: the student, turned, and noise
    teacher = student @ np.linalg.qr(hidden.T)[0].T + 1e-3 * np.random.default_rng(1).normal(
        size=(len(student), 2 * width)
    )
    objective.prepare({"text": states}, {"teacher": torch.from_numpy(teacher).float()})
    if name == "HPD":
        teacher = teacher @ objective.components.double().numpy().T
    if name == "CRD":
        teacher = teacher @ objective.teacher_projection.weight.detach().double().numpy().T
    weight = getattr(objective, layer).weight.detach().double().numpy()
    gram = weight.T @ weight if len(weight) >= width else weight @ weight.T
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)
    distance = np.linalg.norm(student @ weight.T - teacher)
    if len(weight) == width:  # scipy's maps are square
        best, _ = linalg.orthogonal_procrustes(student, teacher)
        assert distance == pytest.approx(np.linalg.norm(student @ best - teacher), rel=1e-4)
    others = [projection(width, len(weight)).weight.detach().double().numpy() for _ in range(20)]
    assert distance < 0.9 * min(np.linalg.norm(student @ other.T - teacher) for other in others)


def test_misshapen_batches_are_named():
    objective = OBJECTIVES["MSE"]()
    texts, targets = batch_for(objective)
    with pytest.raises(ValueError, match=r"as many rows of each, .*embedding.*\[4, 6\], targets.*\[3, 9\]"):
        objective(texts, {"teacher": targets["teacher"][:3]})
    with pytest.raises(ValueError, match="student and teacher of one width, got 9 and 8"):
        objective(texts, {"teacher": targets["teacher"][:, :8]})
    with pytest.raises(ValueError, match=r"\[n, 2, C\], one for each view, got \[4, 6\]"):
        UnsupervisedSimCSE()({"text": {"embedding": torch.ones(4, 6)}}, {})
    with pytest.raises(NotImplementedError):
        Objective().loss({}, {})


@each_objective
def test_a_batch_of_one_is_refused_or_has_a_loss(make):
    objective = make()
    texts, targets = batch_for(objective, rows=1)
    alone_is_enough = {"negatives"} & set(objective.columns) or isinstance(objective, MSE | HPD | CosineRegression)
    if alone_is_enough:
        assert objective(texts, targets).isfinite()
    else:
        with pytest.raises(ValueError, match=r"at least (2|two)"):
            objective(texts, targets)
