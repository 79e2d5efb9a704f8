# A caption for every voxel: weights of an encoder, projected on a library of natural embeddings and put into words. A folder or a
# store of one's own is no input that the graph waits for, as with one's own recordings.

LIBRARY = CAPTIONING.get("library", {})
BASELINE = CAPTIONING.get("baseline", {})
CAPTIONED = MODELS[CAPTIONING["model"]]["layers"] if CAPTIONING else []


def captioning_images(images):
    """The folder of the library's or the baseline's images."""
    what = CAPTIONING[images]
    return stimuli_folder(what["study"]) if "study" in what else what["folder"]


rule library:
    input:
        card=lambda w: f"{OUT}/models/{CAPTIONING['model']}.json",
        images=lambda w: (
            stimuli_source(CAPTIONING[w.images]["study"]) if "study" in CAPTIONING[w.images] else []
        ),
    output:
        OUT + "/captioning/{images}.json",
    log:
        OUT + "/logs/library/{images}.log",
    benchmark:
        OUT + "/benchmarks/library/{images}.tsv"
    wildcard_constraints:
        images="library|baseline",
    params:
        model=lambda w: model_options(CAPTIONING["model"]),
        folder=lambda w: captioning_images(w.images),
        store=OUT + "/features/store",
        # Embeddings as the model gives them: their norms count.
        options=options(layers=CAPTIONED, pooling="mean", autocast=config["features"]["autocast"]),
    threads: resource("library", "threads")
    resources:
        **needs("library"),
    shell:
        "brainalign features {params.model} --stimuli {params.folder} --store {params.store}"
        " --out {output} {params.options}"
        " --batch-size {config[features][batch_size]} --workers {threads}"
        " --device {config[features][device]} 2> {log}"


rule caption:
    input:
        encoded=lambda w: f"{OUT}/encoding/{CAPTIONING['study']}/{w.subject}/{CAPTIONING['model']}",
        library=lambda w: [] if "store" in LIBRARY else f"{OUT}/captioning/library.json",
        baseline=f"{OUT}/captioning/baseline.json" if BASELINE else [],
        check_with=lambda w: (
            f"{OUT}/encoding/{CAPTIONING['study']}/{w.subject}/{CAPTIONING['check_with']}"
            if "check_with" in CAPTIONING
            else []
        ),
    output:
        captions=directory(OUT + "/captioning/captions/{subject}.zarr"),
        **(
            {"baseline": directory(OUT + "/captioning/captions/{subject}-best-images.zarr")}
            if BASELINE
            else {}
        ),
    log:
        OUT + "/logs/caption/{subject}.log",
    benchmark:
        OUT + "/benchmarks/caption/{subject}.tsv"
    params:
        library=LIBRARY.get("store", OUT + "/captioning/library.json"),
        options=lambda w, input: options(
            layer=CAPTIONED[0],
            check_with=input.get("check_with") or None,
            captioner=CAPTIONING["captioner"]["name"],
            tokenizer=CAPTIONING["captioner"]["tokenizer"],
            **{k: CAPTIONING["captioner"].get(k) for k in ("clip", "prompt")},
            **{k: CAPTIONING.get(k) for k in ("draws", "temperature", "q", "beams", "max_tokens")},
            held_out=OUT + "/captioning/baseline.json" if BASELINE else None,
            held_out_stimuli=captioning_images("baseline") if "flag" in BASELINE else None,
            held_out_flag=BASELINE.get("flag"),
            seed=config["seed"],
        ),
    threads: resource("caption", "threads")
    resources:
        **needs("caption"),
    shell:
        "brainalign caption --encoded {input.encoded} --library {params.library}"
        " --out {output.captions} {params.options} --device {config[features][device]} 2> {log}"


rule captioning_section:
    input:
        captions=[f"{OUT}/captioning/captions/{subject}.zarr" for subject in CAPTIONING.get("subjects", [])],
        encoded=[
            f"{OUT}/encoding/{CAPTIONING['study']}/{subject}/{CAPTIONING['model']}"
            for subject in CAPTIONING.get("subjects", [])
        ],
        data=lambda w: f"{OUT}/studies/{CAPTIONING['study']}/data",
    output:
        section=directory(OUT + "/sections/captioning"),
    log:
        OUT + "/logs/captioning_section.log",
    benchmark:
        OUT + "/benchmarks/captioning_section.tsv"
    params:
        options=options(
            **{k: CAPTIONING.get(k) for k in ("rois", "word_maps", "clusters", "layout")}, seed=config["seed"]
        ),
    threads: resource("evaluate", "threads")
    resources:
        **needs("evaluate"),
    shell:
        "brainalign caption-section {input.captions} --encoded {input.encoded} --data {input.data}"
        " --out {output.section} {params.options} 2> {log}"
