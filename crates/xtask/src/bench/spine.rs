//! The figures of the spine.

use super::row::{Goal, Row};
use crate::shell::Shell;
use anyhow::Result;

const GOALS: [Goal; 8] = [
    Goal { figure: "phase1_ms", unit: "ms", at_most: 500.0 },
    Goal { figure: "deploy_ms", unit: "ms", at_most: 3000.0 },
    Goal { figure: "redeploy_ms", unit: "ms", at_most: 1500.0 },
    Goal { figure: "redeploy_failed", unit: "requests", at_most: 0.0 },
    Goal { figure: "route_ms", unit: "ms", at_most: 50.0 },
    Goal { figure: "control_pss_mib", unit: "MiB", at_most: 60.0 },
    Goal { figure: "edge_h1_cpu_vs_nginx", unit: "ratio", at_most: 1.0 },
    Goal { figure: "image_build_ms", unit: "ms", at_most: 200.0 },
];

pub(super) fn run(_shell: &Shell) -> Result<()> {
    for goal in GOALS {
        println!("{}", Row::new(goal, None));
    }
    Ok(())
}
