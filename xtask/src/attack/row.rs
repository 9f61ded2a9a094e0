//! One attack's row: what was tried, what came of it with podgate's defenses and without, and the verdict.
//!
//! Owns the verdict; never runs anything.

use comfy_table::Cell;
use serde::{Deserialize, Serialize};

use super::{Without, scene::Outcome};
use crate::report;

/// One row.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Row {
    /// That of the virtual machine; none for this machine's.
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<String>,
    attack: String,
    tried: String,
    got: String,
    without: Vec<String>,
    /// What it got without one of several defenses, each in turn.
    layers: Vec<String>,
    control: String,
    is_withstood: bool,
    verdict: String,
    seconds: f64,
}

// === impl Row ===

impl Row {
    pub(super) fn new(
        (attack, tried): (&str, &str),
        without: &[Without],
        defended: &anyhow::Result<Outcome>,
        layers: &[anyhow::Result<Outcome>],
        control: &anyhow::Result<Outcome>,
        seconds: f64,
    ) -> Self {
        let (is_withstood, verdict) = judge(defended, layers, control);
        let say = |outcome: &anyhow::Result<Outcome>| match outcome {
            Ok(outcome) => outcome.got.clone(),
            Err(error) => format!("error: {error:#}"),
        };
        Self {
            kernel: None,
            attack: attack.to_owned(),
            tried: tried.to_owned(),
            got: say(defended),
            without: without.iter().map(ToString::to_string).collect(),
            layers: layers.iter().map(say).collect(),
            control: say(control),
            is_withstood,
            verdict,
            seconds,
        }
    }

    /// The same, where this kernel ran.
    pub(super) fn on(self, kernel: &str) -> Self {
        Self { kernel: Some(kernel.to_owned()), ..self }
    }

    pub(super) fn is_withstood(&self) -> bool {
        self.is_withstood
    }

    /// What it got without each defense, and without all of them.
    fn controls(&self) -> String {
        let each = self.without.iter().zip(&self.layers).map(|(without, got)| format!("{without}: {got}\n"));
        each.chain([format!("{}: {}", self.without.join(", "), self.control)]).collect()
    }

    /// One line, for those who wait.
    pub(super) fn line(&self) -> String {
        let verdict = if self.is_withstood {
            report::success(&self.verdict)
        } else {
            format!("{}: {}; without {}", report::failure(&self.verdict), self.got, self.controls())
        };
        format!("{:<24} {verdict} ({:.1} s)", self.attack, self.seconds)
    }
}

/// Prints the table and one line of verdict.
pub(super) fn print(rows: &[Row]) {
    let mut table =
        report::table(&["attack", "what was tried", "what it got", "control: without …, it got", "verdict"]);
    for row in rows {
        table.add_row([
            Cell::new(
                row.kernel
                    .as_ref()
                    .map_or_else(|| row.attack.clone(), |kernel| format!("{}, kernel {kernel}", row.attack)),
            ),
            Cell::new(&row.tried),
            Cell::new(&row.got),
            Cell::new(row.controls()),
            report::verdict(row.is_withstood, &row.verdict),
        ]);
    }
    println!("{table}");
    let failed = rows.iter().filter(|row| !row.is_withstood).count();
    if failed == 0 {
        println!(
            "{}",
            report::success(format!("all {} attacks fail, and work without the defense", rows.len()))
        );
    } else {
        println!("{}", report::failure(format!("{failed} of {} rows are not as they should be", rows.len())));
    }
}

/// An attack that would not work anyway proves nothing.
fn judge(
    defended: &anyhow::Result<Outcome>,
    layers: &[anyhow::Result<Outcome>],
    control: &anyhow::Result<Outcome>,
) -> (bool, String) {
    let layer_fails = layers.iter().any(|layer| !matches!(layer, Ok(Outcome { is_harm: false, .. })));
    let (is_withstood, verdict) = match (defended, control) {
        (Ok(Outcome { is_harm: true, .. }), _) => (false, "the attack works"),
        (Ok(_), _) if layer_fails => (false, "one of the defenses does not do alone"),
        (Err(_), _) => (false, "not run: the attack could not be carried out"),
        (Ok(_), Ok(Outcome { is_harm: true, .. })) => (true, "withstood"),
        (Ok(_), _) => (false, "not run: the control fails"),
    };
    (is_withstood, verdict.to_owned())
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn an_attack_is_withstood_only_if_it_fails_and_its_control_works() {
        let harm = || Ok(Outcome::harm("a role"));
        let nothing = || Ok(Outcome::nothing("HTTP 403"));
        let error = || Err(anyhow!("no"));
        for (defended, layers, control, is_withstood) in [
            (nothing(), vec![], harm(), true),
            (nothing(), vec![nothing(), nothing()], harm(), true),
            (nothing(), vec![nothing(), harm()], harm(), false),
            (nothing(), vec![error(), nothing()], harm(), false),
            (nothing(), vec![], nothing(), false),
            (nothing(), vec![], error(), false),
            (harm(), vec![], harm(), false),
            (harm(), vec![], nothing(), false),
            (error(), vec![], harm(), false),
        ] {
            let case = format!("{defended:?}, {layers:?}, {control:?}");
            assert_eq!(judge(&defended, &layers, &control).0, is_withstood, "{case}");
        }
    }
}
