//! One attack's row: what was tried, what came of it in each mode with podgate's defenses and without, and the verdicts.
//!
//! Owns the verdicts; never runs anything.

use comfy_table::Cell;
use serde::{Deserialize, Serialize};

use super::{Attack, modes::Mode, scene::Outcome};
use crate::report;

/// How wide the columns with sentences are, at most.
const WIDTH: usize = 34;

/// One row.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Row {
    /// That of the virtual machine; none for this machine's.
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<String>,
    attack: String,
    tried: String,
    /// What the controls do without.
    without: Vec<String>,
    /// One for each mode in which it was tried.
    modes: Vec<InMode>,
    seconds: f64,
}

/// What came of an attack in one mode.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct InMode {
    mode: Mode,
    got: String,
    /// What it got without one of several defenses, each in turn.
    layers: Vec<String>,
    /// What it got without all of them; none where that says nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    control: Option<String>,
    /// Why it says nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    no_control: Option<String>,
    is_withstood: bool,
    verdict: String,
}

// === impl Row ===

impl Row {
    pub(super) fn new(attack: &Attack, modes: Vec<InMode>, seconds: f64) -> Self {
        Self {
            kernel: None,
            attack: attack.name.to_owned(),
            tried: attack.tried.to_owned(),
            without: attack.without.iter().map(ToString::to_string).collect(),
            modes,
            seconds,
        }
    }

    /// The same, where this kernel ran.
    pub(super) fn on(self, kernel: &str) -> Self {
        Self { kernel: Some(kernel.to_owned()), ..self }
    }

    pub(super) fn is_withstood(&self) -> bool {
        self.modes.iter().all(|in_mode| in_mode.is_withstood)
    }

    fn name(&self) -> String {
        self.kernel
            .as_ref()
            .map_or_else(|| self.attack.clone(), |kernel| format!("{}, kernel {kernel}", self.attack))
    }

    /// What it got without all defenses, in the first mode where that says something.
    fn control(&self) -> String {
        let control = self.modes.iter().find_map(|in_mode| in_mode.control.as_deref());
        format!("{}: {}", self.without.join(", "), control.unwrap_or_default())
    }

    /// Everything about a mode in which it is not withstood.
    fn details(&self, in_mode: &InMode) -> String {
        let each = self.without.iter().zip(&in_mode.layers);
        let each = each.map(|(without, got)| format!("; without {without}: {got}"));
        let all = format!(
            "; without {}: {}",
            self.without.join(", "),
            in_mode.control.as_deref().or(in_mode.no_control.as_deref()).unwrap_or_default()
        );
        let controls: String = each.chain([all]).collect();
        format!("{} in {}: {}: {}{controls}", self.name(), in_mode.mode.label(), in_mode.verdict, in_mode.got)
    }

    fn failures(&self) -> impl Iterator<Item = String> {
        self.modes.iter().filter(|in_mode| !in_mode.is_withstood).map(|in_mode| self.details(in_mode))
    }

    /// What to say to those who wait: one line, or one for each mode in which it is not withstood.
    pub(super) fn lines(&self) -> String {
        let modes: Vec<_> = self.modes.iter().map(|in_mode| in_mode.mode.label()).collect();
        let failures: Vec<_> = self.failures().map(report::failure).collect();
        if failures.is_empty() {
            let verdict = report::success("withstood");
            format!("{:<24} {verdict} in {} ({:.1} s)", self.attack, modes.join(", "), self.seconds)
        } else {
            failures.join("\n")
        }
    }
}

// === impl InMode ===

impl InMode {
    pub(super) fn new(
        mode: Mode,
        defended: &anyhow::Result<Outcome>,
        layers: &[&anyhow::Result<Outcome>],
        control: Result<&anyhow::Result<Outcome>, &str>,
    ) -> Self {
        let (is_withstood, verdict) = judge(defended, layers, control.ok());
        let say = |outcome: &anyhow::Result<Outcome>| match outcome {
            Ok(outcome) => outcome.got.clone(),
            Err(error) => format!("error: {error:#}"),
        };
        Self {
            mode,
            got: say(defended),
            layers: layers.iter().copied().map(say).collect(),
            control: control.ok().map(say),
            no_control: control.err().map(str::to_owned),
            is_withstood,
            verdict: verdict.to_owned(),
        }
    }

    fn cell(&self) -> Cell {
        let unproven = if self.control.is_none() { "\n(no control)" } else { "" };
        report::verdict(self.is_withstood, format!("{}{unproven}", self.verdict))
    }
}

/// Prints the table, what is wrong, and one line of verdict.
pub(super) fn print(rows: &[Row]) {
    let modes = Mode::ALL.map(Mode::label);
    let columns = [&["attack", "what was tried", "control: without …, it got"], &modes[..]].concat();
    let mut table = report::table(&columns);
    for row in rows {
        let name = row.name().replace(", ", "\n");
        let wrapped = |text: &str| Cell::new(report::wrap(text, WIDTH).join("\n"));
        let mut cells = vec![Cell::new(name), wrapped(&row.tried), wrapped(&row.control())];
        cells.extend(Mode::ALL.map(|mode| {
            row.modes.iter().find(|in_mode| in_mode.mode == mode).map_or(Cell::new("-"), InMode::cell)
        }));
        table.add_row(cells);
    }
    println!("{table}");
    let failures: Vec<_> = rows.iter().flat_map(Row::failures).collect();
    if failures.is_empty() {
        let verdict = format!("all {} attacks fail, and work without the defense", rows.len());
        println!("{}", report::success(verdict));
        return;
    }
    for failure in &failures {
        println!("{failure}");
    }
    let failed = rows.iter().filter(|row| !row.is_withstood()).count();
    println!("{}", report::failure(format!("{failed} of {} rows are not as they should be", rows.len())));
}

/// An attack that would not work anyway proves nothing; where it cannot, there is no control.
fn judge(
    defended: &anyhow::Result<Outcome>,
    layers: &[&anyhow::Result<Outcome>],
    control: Option<&anyhow::Result<Outcome>>,
) -> (bool, &'static str) {
    let layer_fails = layers.iter().any(|layer| !matches!(layer, Ok(Outcome { is_harm: false, .. })));
    match (defended, control) {
        (Ok(Outcome { is_harm: true, .. }), _) => (false, "the attack works"),
        (Ok(_), _) if layer_fails => (false, "one of the defenses does not do alone"),
        (Err(_), _) => (false, "not run: the attack could not be carried out"),
        (Ok(_), None | Some(Ok(Outcome { is_harm: true, .. }))) => (true, "withstood"),
        (Ok(_), Some(_)) => (false, "not run: the control fails"),
    }
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
            (nothing(), vec![], Some(harm()), true),
            (nothing(), vec![nothing(), nothing()], Some(harm()), true),
            (nothing(), vec![nothing(), harm()], Some(harm()), false),
            (nothing(), vec![error(), nothing()], Some(harm()), false),
            (nothing(), vec![], Some(nothing()), false),
            (nothing(), vec![], Some(error()), false),
            (harm(), vec![], Some(harm()), false),
            (harm(), vec![], Some(nothing()), false),
            (error(), vec![], Some(harm()), false),
            (nothing(), vec![], None, true),
            (harm(), vec![], None, false),
            (error(), vec![], None, false),
        ] {
            let case = format!("{defended:?}, {layers:?}, {control:?}");
            assert_eq!(
                judge(&defended, &layers.iter().collect::<Vec<_>>(), control.as_ref()).0,
                is_withstood,
                "{case}"
            );
        }
    }
}
