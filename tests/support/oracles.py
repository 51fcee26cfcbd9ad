"""Slow float64 references, from the formulas, sharing nothing with the library; and synthetic activations."""

import numpy as np

from jaxcrit.similarity import GramTables


def paper_cka(hidden, kernel="linear"):
    """The paper's algorithm, pair by pair: raw Grams, H K H, sums of products."""

    def gram(x):
        if kernel == "linear":
            return x @ x.T
        squares = ((x[:, None, :] - x[None, :, :]) ** 2).sum(-1)
        nonzero = np.sort(squares[squares != 0])
        return np.exp(-squares / (2 * nonzero[(nonzero.size - 1) // 2]))

    def hsic(x, y):
        n = len(x)
        h = np.eye(n) - np.ones((n, n)) / n
        return np.sum((h @ gram(x) @ h) * (h @ gram(y) @ h))

    hidden = np.asarray(hidden, np.float64)
    return np.array([[hsic(x, y) / (np.sqrt(hsic(x, x)) * np.sqrt(hsic(y, y))) for y in hidden] for x in hidden])


def gram(x):
    """Centred linear Gram ``[N, N]``."""
    x = np.asarray(x, np.float64)
    x = x - x.mean(0)
    return x @ x.T


def rbf_gram(x, squared_bandwidth=None):
    """RBF Gram, not centred, with the paper's bandwidth unless given."""
    x = np.asarray(x, np.float64)
    squares = ((x[:, None, :] - x[None, :, :]) ** 2).sum(-1)
    return np.exp(-squares / (2 * (squared_bandwidth or bandwidth(x))))


def bandwidth(x):
    """Lower median of the non-zero squared distances."""
    x = np.asarray(x, np.float64)
    pairs = ((x[:, None, :] - x[None, :, :]) ** 2).sum(-1)[np.triu_indices(len(x), 1)]
    pairs = np.sort(pairs[pairs > 0])
    return pairs[(len(pairs) - 1) // 2]


def song(k, l):  # noqa: E741
    """HSIC_1, literally Eq. 5 of Song et al. 2012."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ l) + middle - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


def u_centred_product(k, l):  # noqa: E741
    """The same by U-centring (Szekely and Rizzo 2014)."""
    n = len(k)

    def centre(g):
        g = g - np.diag(np.diag(g))
        g = g - g.sum(0) / (n - 2) - g.sum(1)[:, None] / (n - 2) + g.sum() / ((n - 1) * (n - 2))
        return g - np.diag(np.diag(g))

    return np.sum(centre(k) * centre(l)) / (n * (n - 3))


def biased_product(k, l):  # noqa: E741
    """HSIC_b of any Grams."""
    h = np.eye(len(k)) - 1 / len(k)
    return np.sum((h @ k @ h) * (h @ l @ h))


def ratio(product, grams):
    """CKA of all pairs from an inner product of Grams."""
    return np.array(
        [[product(k, l) / np.sqrt(product(k, k) * product(l, l)) for l in grams] for k in grams]  # noqa: E741
    )


def oracle(hidden, bias="biased"):
    """Float64 linear CKA of all pairs."""
    return ratio({"biased": biased_product, "debiased": u_centred_product}[bias], [gram(x) for x in hidden])


def chain(layers, samples, width, *, rho=0.9, power=0.3, seed=0):
    """Activations ``[L, N, D]`` float32 that drift from layer to layer, spectrum k^-power."""
    rng = np.random.default_rng(seed)
    scale = np.arange(1, width + 1) ** -power
    state = rng.standard_normal((samples, width)) * scale
    states = [state]
    for _ in range(layers - 1):
        state = rho * state + np.sqrt(1 - rho**2) * rng.standard_normal((samples, width)) * scale
        states.append(state)
    return np.asarray(states, np.float32)


def with_outliers(hidden, mean, deviation, *, rho=0.8, seed=1):
    """Two dimensions replaced by large, nearly constant ones that are correlated across layers."""
    rng = np.random.default_rng(seed)
    layers, samples, _ = hidden.shape
    shared, own = rng.standard_normal((1, samples, 2)), rng.standard_normal((layers, samples, 2))
    hidden = hidden.copy()
    hidden[:, :, :2] = mean + deviation * (np.sqrt(rho) * shared + np.sqrt(1 - rho) * own)
    return hidden


def states(samples=40, layers=10, planted=5, seed=0, width=30, jump=0.5):
    """A random walk over layers with one larger step, into layer ``planted``; ``[L, N, D]`` float32."""
    rng = np.random.default_rng(seed)
    walk = [rng.standard_normal((samples, width))]
    for layer in range(1, layers):
        keep = jump if layer == planted else 0.95
        walk.append(keep * walk[-1] + np.sqrt(1 - keep**2) * rng.standard_normal((samples, width)))
    return np.asarray(walk, np.float32)


def tables_of(matrices):
    """GramTables in float64 throughout, to test the host's formulas alone."""
    centred = np.asarray(matrices)
    diagonals = np.diagonal(centred, axis1=1, axis2=2)
    bare = centred - np.eye(centred.shape[1]) * centred
    return GramTables(
        rows=np.einsum("kmi,lmi->mkl", bare, bare),
        weighted=np.einsum("kmi,li->mkl", bare, diagonals),
        diagonals=diagonals.copy(),
    )
