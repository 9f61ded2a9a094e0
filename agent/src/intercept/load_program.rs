//! How a program gets into the kernel: verified and compiled, or rejected with the verifier's reason.
//!
//! Owns which kinds of program the object has; never attaches one.

use aya::{
    Ebpf,
    programs::{CgroupSkb, CgroupSockAddr, Program, ProgramError, SchedClassifier, SkLookup, SockOps},
};

use super::Error;

/// How much of a verifier's log an error repeats; the reason is at its end.
const LOG_TAIL_LINES: usize = 20;

/// Lets the kernel verify and compile one program.
pub(super) fn load_program(ebpf: &mut Ebpf, name: &'static str) -> Result<(), Error> {
    let program = ebpf.program_mut(name).ok_or(Error::Mismatch { what: name })?;
    let result = match program {
        Program::CgroupSockAddr(program) => CgroupSockAddr::load(program),
        Program::SockOps(program) => SockOps::load(program),
        Program::CgroupSkb(program) => CgroupSkb::load(program),
        Program::SkLookup(program) => SkLookup::load(program),
        Program::SchedClassifier(program) => SchedClassifier::load(program),
        _ => return Err(Error::Mismatch { what: name }),
    };
    result.map_err(|error| match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            let lines: Vec<_> = log.lines().filter(|line| !line.is_empty()).collect();
            let tail = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
            Error::Rejected { program: name, source: io_error.into(), log_tail: tail.join("\n") }
        }
        other => Error::Rejected { program: name, source: other.into(), log_tail: String::new() },
    })
}
