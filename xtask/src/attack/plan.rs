//! Which attempts share a lab, and in which order.
//!
//! Owns the plan; never carries it out. What an attempt may change for good in a lab, its attack says; everything else
//! about a lab that cannot be changed while it is up, the attempt's agent says.

use lab::cgroupfs::CgroupDriver;

use super::{
    Attack, LabKind, Without,
    modes::{Mode, Scope},
};

/// The attacker's namespace, but for the attempt's number.
pub(super) const EVIL: &str = "evil";

/// One try of an attack.
#[derive(Clone, Copy)]
pub(super) struct Attempt {
    /// Its own.
    pub(super) number: u32,
    pub(super) attack: &'static Attack,
    /// Which row of the table it is for, and what in it.
    pub(super) row: usize,
    /// In which mode of the cluster.
    pub(super) mode: Mode,
    pub(super) part: Part,
    /// What it does without, all of it together.
    pub(super) without: &'static [Without],
}

/// What an attempt is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// To show that it fails.
    Defended,
    /// To show that it fails without this one of several defenses, counted from 0.
    Layer(usize),
    /// To show that it works without all of them: not where it cannot.
    Control,
}

/// Attempts in one lab, one after the other.
pub(super) struct Session {
    pub(super) lab: LabKind,
    pub(super) needs: Needs,
    pub(super) attempts: Vec<Attempt>,
}

/// What a node or its agent cannot be told later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Needs {
    pub(super) driver: CgroupDriver,
    pub(super) mode: Mode,
    pub(super) build: Build,
    /// The agent's flags, in addition to those that all have.
    pub(super) flags: Vec<String>,
}

/// One of the two builds of podgate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Build {
    Podgate,
    Undefended,
}

// === impl Attempt ===

impl Attempt {
    /// Whether the attack is to work.
    pub(super) fn is_harm_expected(&self) -> bool {
        self.part == Part::Control
    }

    /// The same in a lab for nothing else.
    pub(super) fn alone(self) -> Session {
        let lab = match self.attack.lab {
            LabKind::Shared => LabKind::Own,
            own @ (LabKind::Own | LabKind::Quiet | LabKind::Bare) => own,
        };
        Session { lab, needs: self.needs(), attempts: vec![self] }
    }

    fn needs(&self) -> Needs {
        let mut needs =
            Needs { driver: self.attack.driver, mode: self.mode, build: Build::Podgate, flags: Vec::new() };
        for without in self.without {
            match *without {
                Without::Defense(_) => needs.build = Build::Undefended,
                Without::Flags(flag, value) => needs.flags.extend([flag.to_owned(), self.own(value)]),
                Without::Annotation(..) => {}
            }
        }
        needs
    }

    /// A flag's value with this attempt's own namespace in it.
    fn own(&self, value: &str) -> String {
        value.replace(&format!("{EVIL}/"), &format!("{}/", namespace(EVIL, self.number)))
    }
}

/// An attempt's own namespace.
pub(super) fn namespace(name: &str, number: u32) -> String {
    format!("{name}-{number}")
}

/// All attempts of this scope.
pub(super) fn plan(attacks: &[&'static Attack], scope: Scope) -> Vec<Session> {
    let mut sessions: Vec<Session> = Vec::new();
    for attempt in attempts(attacks, scope) {
        let needs = attempt.needs();
        let is_fit = |session: &&mut Session| session.lab == LabKind::Shared && session.needs == needs;
        match sessions.iter_mut().find(is_fit) {
            Some(session) if attempt.attack.lab == LabKind::Shared => session.attempts.push(attempt),
            _ => sessions.push(Session { lab: attempt.attack.lab, needs, attempts: vec![attempt] }),
        }
    }
    sessions
}

fn attempts(attacks: &[&'static Attack], scope: Scope) -> Vec<Attempt> {
    let mut attempts = Vec::new();
    for (row, &attack) in attacks.iter().enumerate() {
        for mode in scope.modes(attack.name) {
            for (part, without) in parts(attack, mode, scope) {
                attempts.push(Attempt { number: 0, attack, row, mode, part, without });
            }
        }
    }
    for (number, attempt) in (1..).zip(&mut attempts) {
        attempt.number = number;
    }
    attempts
}

/// What a row consists of in a mode, and what each is tried without.
pub(super) fn parts(attack: &Attack, mode: Mode, scope: Scope) -> Vec<(Part, &'static [Without])> {
    let layers = attack.without.chunks(1).enumerate().map(|(index, without)| (Part::Layer(index), without));
    let layers = layers.filter(|_| scope.has_layers(mode) && attack.without.len() > 1);
    let control = mode.lacks_control(attack.name).is_none().then_some((Part::Control, attack.without));
    [(Part::Defended, &[][..])].into_iter().chain(layers).chain(control).collect()
}

#[cfg(test)]
mod tests {
    use agent_common::defense::Defense;

    use super::*;
    use crate::attack::{InAudit, scene::Outcome};

    const DEFENSE: Without = Without::Defense(Defense::SingleUse);
    const FLAG: Without = Without::Flags("--egress-filter", "off");
    const DELEGATE: Without = Without::Flags("--token-delegate", "evil/attacker");
    const ANNOTATION: Without = Without::Annotation("key", "value");

    fn attack(lab: LabKind, without: &'static [Without]) -> &'static Attack {
        let run = |_: &_| -> crate::attack::Running<'_> { Box::pin(async { Ok(Outcome::nothing("")) }) };
        Box::leak(Box::new(Attack {
            name: "",
            tried: "",
            without,
            lab,
            pods: InAudit::Audit,
            driver: CgroupDriver::default(),
            run,
        }))
    }

    /// In the first mode, each session's lab, build and flags, and its attempts' rows and parts.
    fn planned(attacks: &[&'static Attack], scope: Scope) -> Vec<(LabKind, Build, String, String)> {
        let told = |session: Session| {
            let attempts: Vec<_> = session
                .attempts
                .iter()
                .map(|attempt| format!("{} {:?}", attempt.row, attempt.part))
                .collect();
            (session.lab, session.needs.build, session.needs.flags.join(" "), attempts.join(", "))
        };
        plan(attacks, scope)
            .into_iter()
            .filter(|session| session.needs.mode == Mode::Intercept)
            .map(told)
            .collect()
    }

    fn row(lab: LabKind, build: Build, flags: &str, attempts: &str) -> (LabKind, Build, String, String) {
        (lab, build, flags.to_owned(), attempts.to_owned())
    }

    #[test]
    fn attempts_with_the_same_build_and_flags_share_a_lab() {
        use {Build::*, LabKind::*};
        let attacks = [
            attack(Shared, &[DEFENSE]),
            attack(Shared, &[FLAG]),
            attack(Shared, &[ANNOTATION]),
            attack(Shared, &[DEFENSE, FLAG]),
        ];
        assert_eq!(
            planned(&attacks, Scope::All),
            [
                row(Shared, Podgate, "", "0 Defended, 1 Defended, 2 Defended, 2 Control, 3 Defended"),
                row(Shared, Undefended, "", "0 Control, 3 Layer(0)"),
                row(Shared, Podgate, "--egress-filter off", "1 Control, 3 Layer(1)"),
                row(Shared, Undefended, "--egress-filter off", "3 Control"),
            ]
        );
    }

    #[test]
    fn each_mode_has_labs_of_its_own() {
        let sessions = plan(&[attack(LabKind::Shared, &[FLAG])], Scope::Modes);
        let modes: Vec<_> = sessions.iter().map(|session| session.needs.mode).collect();
        let expected = Mode::ALL.into_iter().flat_map(|mode| [mode; 2]);
        assert!(modes.into_iter().eq(expected));
        for session in &sessions {
            assert!(session.attempts.iter().all(|attempt| attempt.mode == session.needs.mode));
        }
    }

    #[test]
    fn an_attack_that_wears_its_lab_out_shares_none() {
        use {Build::*, LabKind::*};
        let attacks = [attack(Own, &[DEFENSE]), attack(Shared, &[DEFENSE]), attack(Bare, &[DEFENSE])];
        assert_eq!(
            planned(&attacks, Scope::Hardest),
            [
                row(Own, Podgate, "", "0 Defended"),
                row(Own, Undefended, "", "0 Control"),
                row(Shared, Podgate, "", "1 Defended"),
                row(Shared, Undefended, "", "1 Control"),
                row(Bare, Podgate, "", "2 Defended"),
                row(Bare, Undefended, "", "2 Control"),
            ]
        );
    }

    #[test]
    fn a_flag_names_the_namespace_of_its_own_attempt() {
        let attacks = [attack(LabKind::Shared, &[DELEGATE]), attack(LabKind::Shared, &[DELEGATE])];
        let flags: Vec<_> =
            planned(&attacks, Scope::Hardest).into_iter().map(|(.., flags, _)| flags).collect();
        assert_eq!(flags, ["", "--token-delegate evil-2/attacker", "--token-delegate evil-4/attacker"]);
    }

    #[test]
    fn every_attempt_has_a_number_of_its_own() {
        let attacks = [attack(LabKind::Shared, &[DEFENSE, FLAG]), attack(LabKind::Own, &[FLAG])];
        let sessions = plan(&attacks, Scope::All);
        let mut numbers: Vec<_> =
            sessions.iter().flat_map(|session| &session.attempts).map(|attempt| attempt.number).collect();
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(1..=18));
    }

    #[test]
    fn what_is_tried_alone_gets_a_lab_that_begins_as_its_attack_wants() {
        for (lab, alone) in [
            (LabKind::Shared, LabKind::Own),
            (LabKind::Own, LabKind::Own),
            (LabKind::Quiet, LabKind::Quiet),
            (LabKind::Bare, LabKind::Bare),
        ] {
            let attempts = attempts(&[attack(lab, &[FLAG])], Scope::Hardest);
            let session = attempts[1].alone();
            assert_eq!((session.lab, session.attempts.len()), (alone, 1), "{lab:?}");
            assert_eq!(session.needs.flags, ["--egress-filter", "off"]);
        }
    }
}
