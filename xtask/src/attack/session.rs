//! The attempts of a plan, carried out.
//!
//! Owns the labs, and which results count: what failed in a lab that is not as it was afterwards is tried again in a lab of
//! its own. Never decides what an attacker may get.

use std::time::Instant;

use anyhow::anyhow;
use futures::{StreamExt as _, stream};
use tokio::sync::{
    Semaphore,
    mpsc::{UnboundedSender, unbounded_channel},
};

use super::{
    Attack, Builds, LabKind,
    modes::Scope,
    plan::{Attempt, Part, Session, parts, plan},
    row::{InMode, Row},
    scene::{Outcome, Scene},
};

/// How many labs are up at a time: on nodes of their own attackers do not see each other.
const LABS: u32 = 2;

/// What came of an attempt.
struct Report {
    attempt: Attempt,
    outcome: anyhow::Result<Outcome>,
    /// Whether the lab was good for another attempt afterwards.
    is_lab_well: bool,
    seconds: f64,
}

/// The table as far as it is.
struct Board {
    pending: Vec<Pending>,
    rows: Vec<Option<Row>>,
}

/// What is known of a row.
struct Pending {
    attack: &'static Attack,
    /// How many reports there will be.
    attempts: usize,
    reports: Vec<Report>,
}

/// Runs attacks; the rows in their order.
pub(super) async fn run_all(attacks: &[&'static Attack], builds: &Builds, scope: Scope) -> Vec<Row> {
    let mut board = Board::new(attacks, scope);
    let machine = Semaphore::new(LABS as usize);
    let (sender, mut reports) = unbounded_channel();
    let run = async {
        let (machine, sender) = (&machine, sender);
        let sessions = stream::iter(plan(attacks, scope));
        let run = |session| run_session(session, builds, machine, sender.clone());
        sessions.for_each_concurrent(LABS as usize, run).await;
    };
    let collect = async {
        let mut again = Vec::new();
        while let Some(report) = reports.recv().await {
            if report.counts() {
                board.add(report);
            } else {
                again.push(report.attempt);
            }
        }
        again
    };
    let ((), again) = tokio::join!(run, collect);
    // Alone: on a slow machine two labs may have been in each other's way.
    for attempt in again {
        eprintln!("{}: once more, in a lab of its own", attempt.attack.name);
        let (sender, mut reports) = unbounded_channel();
        run_session(attempt.alone(), builds, &machine, sender).await;
        if let Some(report) = reports.recv().await {
            board.add(report);
        }
    }
    board.rows.into_iter().flatten().collect()
}

/// Carries attempts out, in one lab as long as it is well.
async fn run_session(
    session: Session,
    builds: &Builds,
    machine: &Semaphore,
    reports: UnboundedSender<Report>,
) {
    let share = if session.lab == LabKind::Quiet { LABS } else { 1 };
    let mut scene = None;
    let last = session.attempts.len() - 1;
    for (index, attempt) in session.attempts.iter().enumerate() {
        let _share = machine.acquire_many(share).await;
        let began = Instant::now();
        let staged = match scene.take() {
            Some(scene) => begin_next(scene, attempt).await,
            None => begin(builds, &session, attempt).await,
        };
        let (outcome, ended) = match staged {
            Ok(staged) => {
                let outcome = try_out(&staged, attempt).await;
                (outcome, end(staged, last > 0, index == last).await)
            }
            Err(error) => (Err(anyhow!("{error:#}")), Err(error)),
        };
        let is_lab_well = ended.is_ok();
        match ended {
            Ok(well) => scene = well,
            Err(error) => {
                eprintln!("{}: its lab is not well, and is given up: {error:#}", attempt.attack.name);
            }
        }
        let seconds = began.elapsed().as_secs_f64();
        // The one who collects them has been dropped with everything else if this fails.
        let _ = reports.send(Report { attempt: *attempt, outcome, is_lab_well, seconds });
    }
}

/// A new lab, ready for an attempt.
async fn begin(builds: &Builds, session: &Session, attempt: &Attempt) -> anyhow::Result<Scene> {
    let mut scene = Scene::up(builds, &session.needs)?;
    // An agent that many attempts share starts with every defense.
    if session.lab == LabKind::Shared {
        scene.start_agent().await?;
    }
    scene.begin_attempt(attempt).await?;
    if matches!(session.lab, LabKind::Own | LabKind::Quiet) {
        scene.start_agent().await?;
    }
    Ok(scene)
}

async fn begin_next(mut scene: Scene, attempt: &Attempt) -> anyhow::Result<Scene> {
    scene.begin_attempt(attempt).await?;
    Ok(scene)
}

async fn try_out(scene: &Scene, attempt: &Attempt) -> anyhow::Result<Outcome> {
    let outcome = (attempt.attack.run)(scene).await;
    let is_as_expected = outcome.as_ref().is_ok_and(|outcome| outcome.is_harm == attempt.is_harm_expected());
    if !is_as_expected {
        eprintln!("{}, the end of the agent's log:\n{}", attempt.attack.name, scene.log_tail().await);
    }
    outcome
}

/// The lab for the next attempt, or none after the last. An error if a lab that others use too is not well.
async fn end(mut scene: Scene, is_shared: bool, is_last: bool) -> anyhow::Result<Option<Scene>> {
    let ended = if is_shared { scene.end_attempt().await } else { Ok(()) };
    if ended.is_ok() && !is_last {
        return Ok(Some(scene));
    }
    let down = scene.down().await;
    ended.and(down).map(|()| None)
}

// === impl Report ===

impl Report {
    /// Whether it says something about the attack. What a lab was like that is not well afterwards nobody knows; harm that
    /// a defense should have kept off was done in any lab. A control that did not work may have been too slow.
    fn counts(&self) -> bool {
        let is_harm = self.outcome.as_ref().is_ok_and(|outcome| outcome.is_harm);
        if self.attempt.is_harm_expected() {
            is_harm && self.is_lab_well
        } else {
            is_harm || self.is_lab_well
        }
    }
}

// === impl Board ===

impl Board {
    fn new(attacks: &[&'static Attack], scope: Scope) -> Self {
        let row = |&attack: &&'static Attack| {
            let modes = scope.modes(attack.name).into_iter();
            let attempts = modes.map(|mode| parts(attack, mode, scope).len()).sum();
            Pending { attack, attempts, reports: Vec::new() }
        };
        Self { pending: attacks.iter().map(row).collect(), rows: attacks.iter().map(|_| None).collect() }
    }

    /// Adds what came of an attempt, and shows its row if nothing else is missing from it.
    fn add(&mut self, report: Report) {
        let index = report.attempt.row;
        let pending = &mut self.pending[index];
        pending.reports.push(report);
        if let Some(row) = pending.row() {
            eprintln!("{}", row.lines());
            self.rows[index] = Some(row);
        }
    }
}

// === impl Pending ===

impl Pending {
    fn row(&mut self) -> Option<Row> {
        if self.reports.len() < self.attempts {
            return None;
        }
        let seconds = self.reports.iter().map(|report| report.seconds).sum();
        self.reports.sort_by_key(|report| (report.attempt.mode, report.attempt.part));
        let by_mode = self.reports.chunk_by(|one, next| one.attempt.mode == next.attempt.mode);
        let modes = by_mode.map(|reports| in_mode(self.attack, reports)).collect::<Option<_>>()?;
        Some(Row::new(self.attack, modes, seconds))
    }
}

/// What came of an attack in the mode of these reports, which are in the order of their parts.
fn in_mode(attack: &Attack, reports: &[Report]) -> Option<InMode> {
    let [defended, others @ ..] = reports else { return None };
    let mode = defended.attempt.mode;
    let (layers, control) = match others {
        [layers @ .., control] if control.attempt.part == Part::Control => (layers, Ok(&control.outcome)),
        layers => (layers, Err(mode.lacks_control(attack.name)?)),
    };
    let layers: Vec<_> = layers.iter().map(|layer| &layer.outcome).collect();
    Some(InMode::new(mode, &defended.outcome, &layers, control))
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;
    use crate::attack::list::ATTACKS;

    fn report(attempt: Attempt, is_harm: Option<bool>, is_lab_well: bool) -> Report {
        let outcome = is_harm.map(|is_harm| Outcome { got: String::new(), is_harm });
        Report { attempt, outcome: outcome.context("no"), is_lab_well, seconds: 1.0 }
    }

    /// All attempts of two attacks, each of which has two defenses in its way.
    fn attempts() -> (Vec<&'static Attack>, Vec<Attempt>) {
        let attacks: Vec<_> = ATTACKS.iter().filter(|attack| attack.without.len() == 2).take(2).collect();
        let sessions = plan(&attacks, Scope::Modes);
        let attempts = sessions.into_iter().flat_map(|session| session.attempts).collect();
        (attacks, attempts)
    }

    #[test]
    fn in_a_lab_that_is_not_well_nothing_counts_but_unexpected_harm() {
        let (_, attempts) = attempts();
        for attempt in attempts {
            let is_control = attempt.is_harm_expected();
            for (is_harm, is_lab_well, counts) in [
                (Some(false), true, !is_control),
                (Some(true), true, true),
                (None, true, !is_control),
                (Some(false), false, false),
                (Some(true), false, !is_control),
                (None, false, false),
            ] {
                let case = format!("{:?}: {is_harm:?}, {is_lab_well}", attempt.part);
                assert_eq!(report(attempt, is_harm, is_lab_well).counts(), counts, "{case}");
            }
        }
    }

    #[test]
    fn a_row_is_there_once_all_its_attempts_are_in_any_order() {
        let (attacks, mut attempts) = attempts();
        attempts.reverse();
        let mut board = Board::new(&attacks, Scope::Modes);
        for (done, attempt) in attempts.iter().enumerate() {
            board.add(report(*attempt, Some(attempt.is_harm_expected()), true));
            for (index, row) in board.rows.iter().enumerate() {
                let missing = attempts[done + 1..].iter().filter(|attempt| attempt.row == index).count();
                assert_eq!(row.is_some(), missing == 0);
                assert!(row.as_ref().is_none_or(Row::is_withstood));
            }
        }
    }
}
