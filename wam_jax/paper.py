"""The figures of the papers' tables, as printed beside ours, with what contradicts them.

WAM: arXiv 2603.28955 (Han and Yilmaz). DiWA: arXiv 2508.03645.
"""

METHODS = ("DiWA", "WAM")  # DiWA's world model is a DreamerV2

PREDICTION = {  # Table I; mean and what stands after its "+-"
    "dreamer_v2": {"psnr": (21.66, 2.20), "ssim": (0.807, 0.067), "lpips": (0.149, 0.073), "fvd": (12.13,)},
    "wam": {"psnr": (22.10, 2.22), "ssim": (0.814, 0.061), "lpips": (0.144, 0.072), "fvd": (10.82,)},
}
PREDICTION_NOTE = (
    "The paper's columns are CALVIN's scene D at its sizes (arXiv 2603.28955, Table I), so other pictures than "
    "Playtable's. It does not say which camera, which window of SSIM, or what its ± is; its two models differ by less "
    "than that. They were not trained alike: 230,000 updates for WAM, 2,000,000 for DreamerV2, each of 500 sequences "
    "in its text and of 50 in the code it builds on."
)

SUCCESS: dict[
    str, dict[str, dict[str, tuple[float, ...]]]
] = {  # by stage: Table III and Table IV, success in %; mean and, where given, what stands after its "+-"
    "bc": {
        "DiWA": {
            "open_drawer": (53.3,),
            "close_drawer": (58.6,),
            "move_slider_right": (51.7,),
            "turn_on_led": (44.8,),
        },
        "WAM": {
            "open_drawer": (73.3,),
            "close_drawer": (89.7,),
            "move_slider_right": (82.8,),
            "turn_on_led": (41.4,),
        },
    },
    "ppo": {
        "DiWA": {
            "open_drawer": (74.44, 1.92),
            "close_drawer": (91.95, 1.99),
            "move_slider_left": (83.33, 1.80),
            "move_slider_right": (82.76, 3.45),
            "turn_on_lightbulb": (91.92, 1.75),
            "turn_off_lightbulb": (77.01, 1.99),
            "turn_on_led": (86.21, 3.45),
            "turn_off_led": (82.33, 6.53),
        },
        "WAM": {
            "open_drawer": (96.7, 2.4),
            "close_drawer": (96.6, 1.8),
            "move_slider_left": (87.5, 3.7),
            "move_slider_right": (89.7, 3.2),
            "turn_on_lightbulb": (100.0, 0.0),
            "turn_off_lightbulb": (75.9, 4.3),
            "turn_on_led": (96.6, 2.1),
            "turn_off_led": (100.0, 0.0),
        },
    },
}
MEANS = {  # by stage, each with its source: the paper has two
    "bc": {
        "DiWA": {"Table III": 45.8, "abstract": 59.4},
        "WAM": {"Table III": 61.7, "abstract": 71.2},
    },
    "ppo": {
        "DiWA": {"rows": 83.74, "text": 79.8},
        "WAM": {"rows": 92.88, "text": 92.8},
    },
}
NOT_GIVEN = "not given"
SEEDS = {"bc": dict.fromkeys(METHODS, NOT_GIVEN), "ppo": {"DiWA": "three", "WAM": NOT_GIVEN}}
UPDATES = {"DiWA": "2,000,000", "WAM": "230,000"}  # of the world model; its DreamerV2 baseline stands for DiWA's
EPISODES = "29 (some 30 or 32)"
DEMONSTRATIONS = 50
INTERACTIONS = {  # of PPO a task: imagined, in the environment
    "DiWA": ("about 5,000,000", "0"),  # DiWA's own words
    "WAM": ("2,880,000", "0"),  # 800 iterations x 50 rollouts x 18 decisions x 4 steps, its settings
}
NOTES = {
    "bc": (
        "The paper's columns are CALVIN's scene D, teleoperated play and its sizes (arXiv 2603.28955, Table III; "
        "DiWA there is the same policy on DiWA's features). It contradicts itself: on average 45.8 -> 61.7 in its"
        " Table III, 59.4 -> 71.2 in its abstract; DiWA's own paper (arXiv 2508.03645) has 55.2 as the mean of "
        "its eight rows. Its world models had unequal numbers of updates, and it names no number of seeds."
    ),
    "ppo": (
        "The paper's columns are CALVIN's scene D, teleoperated play and its sizes (arXiv 2603.28955, Table IV; "
        "its DiWA column is DiWA's own, arXiv 2508.03645, three seeds). It contradicts itself: its text says 79.8"
        " on average for DiWA, whose rows have the mean 83.74, and 92.8 for WAM, whose rows have 92.88. Its world"
        " models had unequal numbers of updates; it names no number of seeds for WAM, and does not say what its ±"
        " is. Imagined steps: about 5 million a skill by DiWA's text, 2.88 million by WAM's settings."
    ),
}
