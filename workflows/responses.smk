# What was measured, in the schemas: responses per subject, stimuli, and whatever else a study gives.

SIMULATED = [s for s in STUDIES if STUDIES[s]["loader"] == "simulated"]
RECORDED = [s for s in STUDIES if s not in SIMULATED]


rule responses:
    input:
        lambda w: (
            [] if STUDIES[w.study]["loader"] == "bids" else f"{OUT}/studies/{w.study}/fetched.json"
        ),
    output:
        data=directory(OUT + "/studies/{study}/data"),
    log:
        OUT + "/logs/responses/{study}.log",
    benchmark:
        OUT + "/benchmarks/responses/{study}.tsv"
    wildcard_constraints:
        study="|".join(RECORDED) or "none",
    params:
        loader=lambda w: STUDIES[w.study]["loader"],
        options=lambda w: options(
            data=config["data"],
            subjects=STUDIES[w.study].get("subjects"),
            parameters=STUDIES[w.study]["parameters"] or None,
        ),
    threads: resource("responses", "threads")
    resources:
        **needs("responses"),
    shell:
        "brainalign responses {params.loader} --out {output.data} {params.options} 2> {log}"


rule scenes:
    output:
        stimuli=directory(OUT + "/studies/{study}/stimuli"),
    log:
        OUT + "/logs/scenes/{study}.log",
    benchmark:
        OUT + "/benchmarks/scenes/{study}.tsv"
    wildcard_constraints:
        study="|".join(SIMULATED) or "none",
    params:
        options=lambda w: options(
            **{"seed": config["seed"], **STUDIES[w.study]["parameters"].get("scenes", {})}
        ),
    threads: resource("scenes", "threads")
    resources:
        **needs("scenes"),
    shell:
        "brainalign scenes --out {output.stimuli} {params.options} 2> {log}"


rule simulate:
    input:
        stimuli=OUT + "/studies/{study}/stimuli",
        features=lambda w: (
            f"{OUT}/features/{w.study}/{STUDIES[w.study]['parameters']['model']}.json"
        ),
    output:
        data=directory(OUT + "/studies/{study}/data"),
    log:
        OUT + "/logs/simulate/{study}.log",
    benchmark:
        OUT + "/benchmarks/simulate/{study}.tsv"
    wildcard_constraints:
        study="|".join(SIMULATED) or "none",
    params:
        options=lambda w: options(
            seed=config["seed"],
            subjects=STUDIES[w.study].get("subjects"),
            parameters=STUDIES[w.study]["parameters"].get("simulation"),
        ),
    threads: resource("simulate", "threads")
    resources:
        **needs("simulate"),
    shell:
        "brainalign simulate --features {input.features} --stimuli {input.stimuli}"
        " --out {output.data} {params.options} 2> {log}"
