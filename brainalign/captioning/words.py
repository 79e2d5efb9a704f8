"""What captions say: nouns, categories of words, their shares in regions and clusters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from brainalign.encoding.clusters import spherical_kmeans
from brainalign.errors import ConfigError, MissingDependencyError, SchemaError

__all__ = [
    "CATEGORY_WORDS",
    "LAYOUTS",
    "PERSON_WORDS",
    "Tagger",
    "cluster_words",
    "embed_2d",
    "first_mentioned",
    "noun_prompts",
    "nouns",
    "preferred_category",
    "region_word_share",
    "top_nouns",
    "word_share",
]

#: Returns the nouns of each of some captions, in order, as they stand.
Tagger = Callable[[Sequence[str]], list[list[str]]]

#: Nouns that stand for a person, singular.
PERSON_WORDS = frozenset(
    "adult athlete baby bather batter boy bride child couple crowd driver face family girl guy "
    "human kid lady man men passenger people person player rider skateboarder skier snowboarder "
    "student surfer teenager toddler woman women".split()
)
#: Nouns that say that something is shown, and not what.
_SHOWN = frozenset("drawing image photo photograph picture".split())
#: Category -> words that name it, singular or as a phrase; the categories of the paper, and things.
CATEGORY_WORDS: dict[str, tuple[str, ...]] = {
    "people": tuple(sorted(PERSON_WORDS)),
    "bodies": (
        "ankle", "arm", "body", "body part", "chest", "elbow", "finger", "foot", "hand",
        "knee", "leg", "limb", "shoulder", "thumb", "toe", "torso", "wrist",
    ),
    "places": (
        "airport", "alley", "bathroom", "beach", "bedroom", "bridge", "building", "church", "city",
        "desert", "forest", "hallway", "house", "intersection", "kitchen", "landscape",
        "living room",
        "mountain", "ocean", "office", "park", "place", "railway", "road", "room", "river", "scene",
        "sidewalk", "skyline", "street", "station", "tower", "town",
    ),
    "words": (
        "alphabet", "banner", "letter", "logo", "newspaper", "number", "page of text", "poster",
        "sentence", "sign", "text", "word", "writing",
    ),
    "food": (
        "apple", "banana", "bread", "breakfast", "broccoli", "burger", "bunch of grapes", "cake",
        "carrot", "cheese", "dessert", "dinner", "dish", "donut", "egg", "food", "fruit", "grape",
        "hamburger", "hot dog", "ice cream", "lunch", "meal", "meat", "pasta", "pizza",
        "rice", "salad", "sandwich", "slice of watermelon", "soup", "something to eat",
        "strawberry", "vegetable", "watermelon",
    ),
    "objects": (
        "ball", "bicycle", "book", "bottle", "car", "chair", "clock", "cup", "guitar", "hammer",
        "key", "lamp", "object", "pan", "saucepan", "scissors", "thing", "tool", "toy", "umbrella",
    ),
}  # fmt: skip
#: What has no singular of its own, or is not counted.
_NO_SINGULAR = frozenset(
    "binoculars clothes eyeglasses glasses goggles headquarters jeans leggings news overalls "
    "pajamas pants people pliers pyjamas scissors series shorts species sunglasses tights tongs "
    "trousers".split()
)
#: Nouns whose plural the rules of `_singular` would take for another noun's, by their singular.
_LIKE_KNIVES = (
    "bookshelf calf elf half hoof housewife knife leaf life loaf midwife scarf self sheaf shelf "
    "thief werewolf wharf wife wolf"
)
_WITH_S = (
    "ache aloe auntie avalanche axe barbie beanie bikini birdie bowtie brownie cache calorie canoe "
    "collie cookie cutie doe doggie emu floe foe foodie fuse genie goalie gnu guru headache hippie "
    "hoe hoodie horseshoe jacuzzi junkie kiddie kiwi magpie menu moustache movie muse mustache "
    "necktie oboe panini pixie prairie quiche rookie safari selfie shoe ski smoothie snowshoe "
    "sortie sweetie talkie taxi toe toothache tutu tv veggie zombie zucchini"
)
_ENDING_IN_S = "alias atlas bias bus canvas christmas gas iris lens pancreas"
_PLURALS = {
    **{re.sub("fe?$", "ves", w): w for w in _LIKE_KNIVES.split()},
    **{w + "s": w for w in _WITH_S.split()},
    **{plural: w for w in _ENDING_IN_S.split() for plural in (w, w + "es")},
    "busses": "bus", "cacti": "cactus", "children": "child", "feet": "foot", "geese": "goose",
    "grandchildren": "grandchild", "lice": "louse", "mice": "mouse", "oxen": "ox",
    "quizzes": "quiz", "teeth": "tooth",
    **{w: w for w in ("abdomen", "omen", "ramen", "regimen", "specimen", "stamen")},
}  # fmt: skip
#: Parts that animals and statues have as well as persons.
_PARTS = frozenset({"face", *CATEGORY_WORDS["bodies"]})
#: An owner, and up to two words of what it has.
_POSSESSIVE = re.compile(
    r"\b(?!(?:he|here|it|she|that|there|what|who)'s)([a-z]+?)('s|s')((?:\s+[a-z]+){1,2})",
    re.IGNORECASE,
)
#: Layout of weights in the plane -> its name in a text.
LAYOUTS = {"pca": "principal components", "tsne": "t-SNE", "umap": "UMAP"}
_MOST_T_SNE = 5000
_FEWEST_UMAP = 4  # its spectral start needs them


def nouns(captions: Sequence[str], tagger: Tagger | None = None) -> list[list[str]]:
    """Return the nouns of each caption: lower case, singular, in order.

    "Picture", "photo" and their like are left out: they do not say what is shown.

    Parameters
    ----------
    captions : sequence of str
    tagger : callable, optional
        Returns the nouns of captions; by default the pattern tagger of TextBlob, whose lexicon
        comes with the package, so that nothing is downloaded. A caption that comes again is tagged
        once.

    Raises
    ------
    MissingDependencyError
        If there is no tagger and TextBlob is not installed.
    """
    distinct = list(dict.fromkeys(captions))
    found = (tagger or _textblob)(distinct)
    if len(found) != len(distinct):
        raise ConfigError(f"The tagger returned {len(found)} lists for {len(distinct)} captions.")
    singular = [[s for n in one if (s := _singular(n.lower())) not in _SHOWN] for one in found]
    known = dict(zip(distinct, singular, strict=True))
    return [known[c] for c in captions]


def _textblob(captions: Sequence[str]) -> list[list[str]]:
    try:
        from textblob.en.taggers import PatternTagger
    except ImportError as error:
        raise MissingDependencyError(
            "Nouns are found by the package textblob, which is not installed.",
            'Install it with: pip install "brainalign[generation]", or pass a tagger.',
        ) from error
    tagger = PatternTagger()
    return [
        [w for w, tag in tagger.tag(c) if tag in ("NN", "NNS", "NNP", "NNPS")] for c in captions
    ]


def _singular(noun: str) -> str:
    if noun in _NO_SINGULAR:
        return noun
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith("men"):
        return noun[:-3] + "man"
    if noun.endswith("ies") and len(noun) > 4:
        return noun[:-3] + "y"
    if re.search(r"((ch|sh|ss|x|zz|o)|[^aeo]us)es$", noun):
        return noun[:-2]
    # What ends in "ss", "us" or "is" is no plural.
    return noun[:-1] if re.search(r"..[^sui]s$", noun) else noun


def _without_parts(text: str) -> str:
    """Return a caption without parts of the body that are no person's, as in "a dog's face"."""

    def kept(found: re.Match[str]) -> str:
        owner, mark, owned = found.groups()
        if _singular(owner.lower()) in PERSON_WORDS:
            return found[0]
        others = [w for w in owned.split() if _singular(w.lower()) not in _PARTS]
        return " ".join([owner + mark, *others])

    return _POSSESSIVE.sub(kept, text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))


def first_mentioned(text: str, categories: Mapping[str, Sequence[str]]) -> str | None:
    """Return the category that a caption mentions first: what it is about comes before details.

    Parameters
    ----------
    text : str
        A caption.
    categories : mapping of str to sequence of str
        Words or phrases that name each category, singular.

    Returns
    -------
    str or None
        None where none is mentioned. Of names that begin at one word, the longest counts. A face,
        or another part of the body, does not count where it belongs to what is no person: "a dog's
        face".
    """
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", _without_parts(text).lower())
    single = [_singular(w) for w in words]
    forms = {
        tuple(_singular(w) for w in form.lower().split()): category
        for category, listed in categories.items()
        for form in listed
    }
    longest = max(map(len, forms), default=0)
    for start in range(len(single)):
        for length in range(longest, 0, -1):
            category = forms.get(tuple(single[start : start + length]))
            if category is not None:
                return category
    return None


def _grid(captions: xr.Dataset) -> NDArray[np.str_]:
    if captions["caption"].dims != ("neuroid", "draw"):
        raise SchemaError(
            f"Captions of voxels are (neuroid, draw); these are {captions['caption'].dims}."
        )
    return captions["caption"].values.astype(str)


def top_nouns(
    captions: xr.Dataset,
    members: Mapping[str, ArrayLike],
    *,
    top: int = 10,
    tagger: Tagger | None = None,
) -> xr.Dataset:
    r"""Return the nouns that the captions of each region name most.

    .. math:: \mathrm{share}_{r, n} = \frac{1}{|r|\,K} \sum_{v \in r} \sum_{k=1}^{K}
              [n \in \mathrm{caption}_{v, k}]

    Parameters
    ----------
    captions : Dataset
        ``captions`` schema (neuroid, draw).
    members : mapping of str to array of int
        Neuroids of each region; see `brainalign.encoding.roi_members`.
    top : int
        Nouns of each region.
    tagger : callable, optional
        See `nouns`.

    Returns
    -------
    Dataset
        ``share`` (roi, noun) in 0..1 of every noun that is among the top of some region, and
        ``rank`` (roi, noun), from 1, by share in the region and then by name.
    """
    grid = _grid(captions)
    found = _noun_sets(grid, tagger)
    counts = {
        roi: Counter(n for v in np.asarray(index) for one in found[v] for n in one)
        for roi, index in members.items()
    }
    size = {roi: max(len(np.asarray(index)) * grid.shape[1], 1) for roi, index in members.items()}
    ranked = {
        roi: [n for n, _ in sorted(c.items(), key=lambda x: (-x[1], x[0]))]
        for roi, c in counts.items()
    }
    names = list(dict.fromkeys(n for r in ranked.values() for n in r[:top]))
    share = np.array([[counts[r][n] / size[r] for n in names] for r in members])
    place = {r: {n: i + 1 for i, n in enumerate(order)} for r, order in ranked.items()}
    rank = np.array([[place[r].get(n, len(place[r]) + 1) for n in names] for r in members])
    return xr.Dataset(
        {
            "share": (("roi", "noun"), share.reshape(len(members), len(names))),
            "rank": (("roi", "noun"), rank.reshape(len(members), len(names)).astype(int)),
        },
        coords={"roi": list(members), "noun": np.array(names, dtype=str)},
    )


def _noun_sets(grid: NDArray[np.str_], tagger: Tagger | None) -> list[list[set[str]]]:
    flat = nouns(grid.ravel().tolist(), tagger)
    k = grid.shape[1]
    return [[set(one) for one in flat[i : i + k]] for i in range(0, len(flat), k)]


def word_share(
    captions: xr.Dataset,
    words: Sequence[str] | frozenset[str] = PERSON_WORDS,
    tagger: Tagger | None = None,
) -> NDArray[np.float64]:
    """Return the share of each voxel's captions that name one of some nouns.

    The face of what is no person, "a dog's face", names none.

    Parameters
    ----------
    captions : Dataset
        ``captions`` schema (neuroid, draw).
    words : sequence of str
        Nouns, singular; by default those that stand for a person.
    tagger : callable, optional
        See `nouns`.

    Returns
    -------
    ndarray, shape (n_neuroids,)
        In 0..1.
    """
    return _names_one(captions, words, tagger).mean(axis=1)


def _names_one(
    captions: xr.Dataset, words: Sequence[str] | frozenset[str], tagger: Tagger | None
) -> NDArray[np.bool_]:
    """Return, by neuroid and draw, whether a caption names one of the words."""
    wanted = {_singular(w.lower()) for w in words}
    grid = _grid(captions)
    whole = [_without_parts(c) for c in grid.ravel().tolist()]
    found = _noun_sets(np.array(whole, dtype=str).reshape(grid.shape), tagger)
    return np.array([[bool(one & wanted) for one in v] for v in found]).reshape(grid.shape)


def region_word_share(
    captions: xr.Dataset,
    members: Mapping[str, ArrayLike],
    words: Sequence[str] | frozenset[str] = PERSON_WORDS,
    *,
    confidence: float = 0.95,
    tagger: Tagger | None = None,
) -> xr.Dataset:
    r"""Return the share of each region's captions that name one of some nouns.

    .. math:: p_k = \frac{1}{|r|} \sum_{v \in r}
              [\mathrm{caption}_{v, k} \cap \mathrm{words} \neq \emptyset], \qquad
              \bar p \pm t_{K-1} \, s(p_1, \ldots, p_K) / \sqrt{K}

    The interval is over the draws, which project on disjoint parts of the library: it says how far
    the share hangs on which images were in it, and nothing about other voxels or other subjects.

    Parameters
    ----------
    captions : Dataset
        ``captions`` schema (neuroid, draw).
    members : mapping of str to array of int
        Neuroids of each region.
    words : sequence of str
        Nouns, singular; by default those that stand for a person.
    confidence : float
        Of the interval.
    tagger : callable, optional
        See `nouns`.

    Returns
    -------
    Dataset
        ``share``, ``low`` and ``high`` (roi), in 0..1: NaN for a region without neuroids, and the
        ends of the interval also where there is one draw.
    """
    said = _names_one(captions, words, tagger)
    k = said.shape[1]
    share, half = np.full(len(members), np.nan), np.full(len(members), np.nan)
    for i, index in enumerate(members.values()):
        if not len(np.asarray(index)):
            continue
        by_draw = said[np.asarray(index)].mean(axis=0)
        share[i] = by_draw.mean()
        if k > 1:
            half[i] = stats.t.ppf(0.5 + confidence / 2, k - 1) * by_draw.std(ddof=1) / np.sqrt(k)
    return xr.Dataset(
        {
            "share": ("roi", share),
            "low": ("roi", np.clip(share - half, 0, 1)),
            "high": ("roi", np.clip(share + half, 0, 1)),
        },
        coords={"roi": list(members)},
    )


def preferred_category(
    captions: xr.Dataset,
    members: Mapping[str, ArrayLike],
    categories: Mapping[str, Sequence[str]] = CATEGORY_WORDS,
    *,
    confidence: float = 0.95,
) -> xr.Dataset:
    """Say which category the captions of each region are about, if most are about one.

    A voxel speaks for the category that most of its captions mention first. A region prefers a
    category where more than half of its voxels speak for it, with confidence: the lower end of
    Wilson's interval lies above one half. Neighbouring voxels are no independent witnesses, so the
    interval is that of a description and no test.

    Parameters
    ----------
    captions : Dataset
        ``captions`` schema (neuroid, draw).
    members : mapping of str to array of int
        Neuroids of each region.
    categories : mapping of str to sequence of str
        See `first_mentioned`.
    confidence : float
        Of the interval.

    Returns
    -------
    Dataset
        ``voxel_category`` (neuroid), "" for none; ``share``, ``low``, ``high`` (roi, category): the
        share of voxels; ``preferred`` (roi), "" where no category has the majority.
    """
    grid = _grid(captions)
    known = {c: first_mentioned(c, categories) or "" for c in np.unique(grid).tolist()}
    names = list(categories)
    own = []
    for row in grid.tolist():
        counts = Counter(known[c] for c in row if known[c])
        best = counts.most_common(1)
        own.append(best[0][0] if best and best[0][1] * 2 > len(row) else "")
    voxel = np.array(own, dtype=str)
    shape = (len(members), len(names))
    share, low, high = np.zeros(shape), np.zeros(shape), np.ones(shape)
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    for i, index in enumerate(members.values()):
        n = len(np.asarray(index))
        if not n:
            continue
        p = np.array([(voxel[np.asarray(index)] == c).mean() for c in names])
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        share[i], low[i], high[i] = p, middle - half, middle + half
    best = share.argmax(axis=1)
    certain = low[np.arange(len(members)), best] > 0.5
    return xr.Dataset(
        {
            "voxel_category": ("neuroid", voxel),
            "share": (("roi", "category"), share),
            "low": (("roi", "category"), low),
            "high": (("roi", "category"), high),
            "preferred": (
                "roi", np.array([names[b] if c else "" for b, c in zip(best, certain, strict=True)])
            ),
        },
        coords={"roi": list(members), "category": names},
    )  # fmt: skip


def cluster_words(
    weights: ArrayLike,
    captions: xr.Dataset,
    index: ArrayLike,
    *,
    n_clusters: int = 2,
    top: int = 8,
    seed: int = 0,
    n_init: int = 10,
    tagger: Tagger | None = None,
) -> xr.Dataset:
    """Split a region by the direction of its voxels' weights, and say what each part names.

    Parameters
    ----------
    weights : array-like, shape (n_neuroids, n_features)
        Of all neuroids, in the space of the embeddings; see `embedding_weights`.
    captions : Dataset
        ``captions`` schema (neuroid, draw) of the same neuroids.
    index : array-like of int
        The region's neuroids.
    n_clusters, seed, n_init : int
        See `brainalign.encoding.spherical_kmeans`.
    top : int
        Nouns of each cluster.
    tagger : callable, optional
        See `nouns`.

    Returns
    -------
    Dataset
        ``cluster`` (neuroid), of the region's neuroids with their ``neuroid_id``; ``size``
        (cluster_number); ``share`` and ``rank`` as `top_nouns`, and ``excess`` (cluster_number,
        noun): the share less that in the rest of the region.
    """
    w, index = np.asarray(weights), np.asarray(index)
    if len(w) != captions.sizes["neuroid"]:
        raise SchemaError(
            f"{len(w)} weights came with captions of {captions.sizes['neuroid']} neuroids."
        )
    labels, _ = spherical_kmeans(w[index], n_clusters, seed=seed, n_init=n_init)
    members = {str(k): index[labels == k] for k in range(n_clusters)}
    table = top_nouns(captions, members, top=top, tagger=tagger).rename(roi="cluster_number")
    share, size = table["share"].values, np.bincount(labels, minlength=n_clusters)
    rest = np.array([
        np.delete(size, k) @ np.delete(share, k, axis=0) / max(size.sum() - size[k], 1)
        for k in range(n_clusters)
    ])  # fmt: skip
    return table.assign(
        excess=(("cluster_number", "noun"), share - rest.reshape(share.shape)),
        size=("cluster_number", size),
        cluster=("neuroid", labels),
    ).assign_coords(
        cluster_number=np.arange(n_clusters),
        neuroid_id=("neuroid", captions["neuroid_id"].values.astype(str)[index]),
    )


def embed_2d(weights: ArrayLike, *, method: str = "pca", seed: int = 0) -> NDArray[np.float64]:
    """Lay weights out in the plane by their directions.

    Parameters
    ----------
    weights : array-like, shape (n_neuroids, n_features)
    method : {"pca", "tsne", "umap"}
        Principal components of the unit-norm weights, whose axes are the same whenever it is run;
        or t-SNE, of at most 5,000 neuroids, or UMAP of their cosines, in which only neighbourhoods
        mean anything. UMAP needs the package umap-learn.
    seed : int
        Of t-SNE and UMAP.

    Returns
    -------
    ndarray, shape (n_neuroids, 2)

    Raises
    ------
    ConfigError
        If there is no such method, too few neuroids for it or too many.
    MissingDependencyError
        If umap-learn is not installed.

    References
    ----------
    van der Maaten & Hinton (2008), Visualizing data using t-SNE, JMLR. McInnes, Healy & Melville
    (2018), UMAP: uniform manifold approximation and projection for dimension reduction, arXiv.
    """
    if method not in LAYOUTS:
        raise ConfigError(f"method is {method!r}; expected one of {', '.join(LAYOUTS)}.")
    w = np.asarray(weights, dtype=np.float64)
    unit = w / np.linalg.norm(w, axis=1, keepdims=True)
    if method == "pca":
        from sklearn.decomposition import PCA

        return PCA(2, svd_solver="full").fit_transform(unit)
    if method == "umap":
        return _umap(unit, seed)
    if len(unit) > _MOST_T_SNE:
        raise ConfigError(
            f"t-SNE of {len(unit)} neuroids would take too long; it takes {_MOST_T_SNE} at most.",
            "Use method='pca' or 'umap', or fewer neuroids.",
        )
    from sklearn.manifold import TSNE

    perplexity = min(30.0, max((len(unit) - 1) / 3, 1.0))
    made = TSNE(2, metric="cosine", init="random", random_state=seed, perplexity=perplexity)
    return np.asarray(made.fit_transform(unit), dtype=np.float64)


def _umap(unit: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Lay out by UMAP; with a seed it runs on one thread, which makes it repeatable."""
    if len(unit) < _FEWEST_UMAP:
        raise ConfigError(f"UMAP takes {_FEWEST_UMAP} neuroids or more; got {len(unit)}.")
    try:
        from umap import UMAP
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "UMAP is computed by the package umap-learn, which is not installed.",
            'Install it with: pip install "brainalign[umap]", or use method="pca".',
        ) from error
    near = min(15, len(unit) - 1)
    made = UMAP(n_neighbors=near, metric="cosine", random_state=seed, n_jobs=1)
    return np.asarray(made.fit_transform(unit), dtype=np.float64)


def noun_prompts(table: xr.Dataset, *, top: int = 5) -> dict[str, list[tuple[str, float]]]:
    """Return prompts for images of what each region's captions name most.

    Parameters
    ----------
    table : Dataset
        Of `top_nouns`.
    top : int
        Prompts of each region.

    Returns
    -------
    dict of str to list of (str, float)
        By region: "A photo of a NOUN", and the share of captions that name it.
    """
    prompts: dict[str, list[tuple[str, float]]] = {}
    for roi in table["roi"].values.astype(str).tolist():
        row = table.sel(roi=roi).sortby("rank")
        named = [
            (str(n), float(s))
            for n, s in zip(row["noun"].values, row["share"].values, strict=True)
            if s > 0
        ][:top]
        prompts[roi] = [(f"A photo of {_with_article(n)}", s) for n, s in named]
    return prompts


def _with_article(noun: str) -> str:
    if noun in ("text", "food") or noun in _NO_SINGULAR:
        return noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun
