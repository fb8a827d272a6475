from __future__ import annotations

import pytest
import torch

from layerboost.sweep.request_tries import Forest, Request, pack_requests


def _random_requests(n: int, *, vocabulary: int = 3, longest: int = 12) -> list[Request]:
    """Draws requests over a small vocabulary, so that many of them begin alike."""
    requests = []
    for _ in range(n):
        length = int(torch.randint(2, longest + 1, ()))
        tokens = tuple(torch.randint(vocabulary, (length,)).tolist())
        requests.append(Request(tokens, int(torch.randint(1, length, ()))))
    return requests


def _seen(forest: Forest, row: int, node: int) -> list[int]:
    """Returns the tokens that a node sees, its own last."""
    return forest.tokens[row][forest.visible()[row, node]].tolist()


@pytest.mark.parametrize("hidden_size", [1, 8, 1000])
@pytest.mark.parametrize("batch_rows", [1, 5])
def test_every_scored_token_is_read_behind_exactly_what_stands_before_it(hidden_size, batch_rows):
    requests = _random_requests(60)
    found: dict[int, list[tuple[list[int], int, int]]] = {index: [] for index in range(len(requests))}
    for forest in pack_requests(requests, batch_rows=batch_rows, hidden_size=hidden_size):
        n_tokens = forest.tokens.shape[1]
        assert torch.equal(forest.edge_node, forest.edge_node.sort().values)
        for edge_node, token, request in zip(
            forest.edge_node.tolist(), forest.edge_token.tolist(), forest.edge_request.tolist(), strict=True
        ):
            row, node = divmod(int(forest.read_nodes[edge_node]), n_tokens)
            found[request].append((_seen(forest, row, node), int(forest.depths[row, node]), token))
    for index, request in enumerate(requests):
        first = len(request.tokens) - request.n_scored
        expected = [
            (list(request.tokens[:end]), end - 1, request.tokens[end]) for end in range(first, len(request.tokens))
        ]
        assert sorted(found[index], key=lambda edge: edge[1]) == expected


def test_padding_sees_itself_and_nobody_sees_it():
    forests = pack_requests([Request((1, 2, 3, 4), 1), Request((5, 6, 7, 8, 9), 2)], batch_rows=4, hidden_size=1)
    forest = forests[0]
    assert forest.tokens.shape == (1, 4) or len(forests) == 1
    visible = torch.cat([f.visible().flatten() for f in forests])
    assert visible.any()
    wide = pack_requests([Request(tuple(range(21)), 1), Request(tuple(range(30, 48)), 1)], batch_rows=2, hidden_size=1)
    assert [tuple(f.tokens.shape) for f in wide] == [(2, 20)]
    padded = wide[0].visible()[1]
    assert padded[17:].sum() == 3 and padded[:, 17:].sum() == 3 and padded.diagonal().all()


def test_what_requests_share_is_held_once():
    context = tuple(range(100, 150))
    requests = [Request((*context, choice, 7), 2) for choice in range(4)]
    (forest,) = pack_requests([*requests, requests[0]], batch_rows=8, hidden_size=64)
    assert forest.tokens.shape == (1, 54)
    assert len(forest.read_nodes) == 5 and len(forest.edge_token) == 10


def test_strangers_do_not_share_a_row_and_rows_of_a_forest_are_of_similar_length():
    requests = [
        Request((i, *torch.randint(1000, (length,)).tolist()), 1) for i, length in enumerate([9, 10, 40, 41, 80])
    ]
    forests = pack_requests(requests, batch_rows=8, hidden_size=64)
    assert [tuple(forest.tokens.shape) for forest in forests] == [(1, 80), (2, 41), (2, 10)]


def test_a_row_holds_no_more_than_its_capacity():
    shared = tuple(range(2000))
    requests = [Request((*shared, i, *range(100)), 1) for i in range(40)]
    forests = pack_requests(requests, batch_rows=1, hidden_size=10_000)
    assert max(forest.tokens.shape[1] for forest in forests) == 2100
    many = [Request((*range(500), i, *range(100)), 1) for i in range(40)]
    assert max(forest.tokens.shape[1] for forest in pack_requests(many, batch_rows=1, hidden_size=10_000)) <= 1024


def test_no_requests_make_no_forest_and_senseless_ones_are_refused():
    assert pack_requests([], batch_rows=1, hidden_size=1) == []
    for tokens, n_scored in (((1, 2), 2), ((1, 2), 0), ((1,), 1)):
        with pytest.raises(ValueError, match="n_scored"):
            Request(tokens, n_scored)
