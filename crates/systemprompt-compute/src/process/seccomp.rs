//! System calls that an instance is refused, as a classic BPF program for the kernel (seccomp).
//!
//! Namespaces and a uid without privileges do not reach everything: kernel keyrings are per user and not per
//! namespace, sockets of the family VSOCK know no network namespaces and lead to the hypervisor's other side, and
//! some calls are nothing but kernel surface that a web application has no use for. What needs a privilege that the
//! instance cannot have is refused as well. Everything else is allowed.

/// One classic BPF instruction (`struct sock_filter`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u16,
    if_true: u8,
    if_false: u8,
    value: u32,
}

const LOAD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;

// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const FIRST_ARGUMENT: u32 = 16;

const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
const EAFNOSUPPORT: u32 = 97;

/// UNIX, INET, INET6, NETLINK.
const FAMILIES: [u32; 4] = [1, 2, 10, 16];

/// What differs between processors.
struct Machine {
    architecture: u32,
    socket: u32,
    /// Numbers from here on are of another ABI of the same processor (x32).
    foreign_from: Option<u32>,
    /// Refused with EPERM.
    refused: &'static [u32],
}

/// Refused with ENOSYS, so that libraries fall back to what they did before it existed: `io_uring`.
/// These and the newer ones have one number everywhere.
const UNKNOWN: [u32; 3] = [425, 426, 427];
/// `open_tree`, `move_mount`, `fsopen`, `fsconfig`, `fsmount`, `fspick`, `mount_setattr`.
const MOUNTS: [u32; 7] = [428, 429, 430, 431, 432, 433, 442];

const X86_64: Machine = Machine {
    architecture: 0xc000_003e,
    socket: 41,
    foreign_from: Some(0x4000_0000),
    refused: &[
        103, 163, 165, 166, 167, 168, 169, 172, 173, 175, 176, 155, 179, // syslog … quotactl
        246, 248, 249, 250, // kexec_load, add_key, request_key, keyctl
        298, 304, 308, 313, 320, 321, 323, // perf_event_open … userfaultfd
    ],
};

const AARCH64: Machine = Machine {
    architecture: 0xc000_00b7,
    socket: 198,
    foreign_from: None,
    refused: &[
        39, 40, 41, 60, 89, 104, 105, 106, 116, 142, 224, 225, // umount2 … swapoff
        217, 218, 219, // add_key, request_key, keyctl
        241, 265, 268, 273, 280, 282, 294, // perf_event_open … kexec_file_load
    ],
};

/// The program for this processor in the kernel's form; nothing for processors that are not known here.
pub(crate) fn program() -> Option<Vec<u8>> {
    let machine = match std::env::consts::ARCH {
        "x86_64" => X86_64,
        "aarch64" => AARCH64,
        _ => return None,
    };
    let bytes = |instruction: &Instruction| {
        let mut bytes = [0; 8];
        bytes[..2].copy_from_slice(&instruction.code.to_ne_bytes());
        bytes[2] = instruction.if_true;
        bytes[3] = instruction.if_false;
        bytes[4..].copy_from_slice(&instruction.value.to_ne_bytes());
        bytes
    };
    Some(instructions(&machine).iter().flat_map(bytes).collect())
}

fn instructions(machine: &Machine) -> Vec<Instruction> {
    let mut program = vec![load(ARCHITECTURE), equal(machine.architecture, 1, 0), answer(ERRNO | ENOSYS), load(NUMBER)];
    if let Some(first) = machine.foreign_from {
        program.push(Instruction { code: JUMP_AT_LEAST, if_true: 0, if_false: 1, value: first });
        program.push(answer(ERRNO | ENOSYS));
    }
    let refuse = |numbers: &[u32], error| {
        let pair = move |number: &u32| [equal(*number, 0, 1), answer(ERRNO | error)];
        numbers.iter().flat_map(pair).collect::<Vec<_>>()
    };
    program.extend(refuse(machine.refused, EPERM));
    program.extend(refuse(&MOUNTS, EPERM));
    program.extend(refuse(&UNKNOWN, ENOSYS));
    program.extend([equal(machine.socket, 1, 0), answer(ALLOW), load(FIRST_ARGUMENT)]);
    program.extend(FAMILIES.iter().flat_map(|family| [equal(*family, 0, 1), answer(ALLOW)]));
    program.push(answer(ERRNO | EAFNOSUPPORT));
    program
}

fn load(offset: u32) -> Instruction {
    Instruction { code: LOAD, if_true: 0, if_false: 0, value: offset }
}

/// Skips so many instructions when the loaded value is, or is not, `value`.
fn equal(value: u32, if_true: u8, if_false: u8) -> Instruction {
    Instruction { code: JUMP_EQUAL, if_true, if_false, value }
}

fn answer(value: u32) -> Instruction {
    Instruction { code: RETURN, if_true: 0, if_false: 0, value }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel does.
    fn run(machine: &Machine, architecture: u32, number: u32, argument: u32) -> u32 {
        let program = instructions(machine);
        let (mut at, mut loaded) = (0, 0);
        loop {
            let instruction = program[at];
            let jump = |taken| usize::from(if taken { instruction.if_true } else { instruction.if_false });
            at += 1;
            match instruction.code {
                RETURN => return instruction.value,
                LOAD => {
                    loaded = match instruction.value {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        _ => argument,
                    }
                }
                JUMP_EQUAL => at += jump(loaded == instruction.value),
                JUMP_AT_LEAST => at += jump(loaded >= instruction.value),
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn what_is_refused_and_what_is_not() {
        for machine in [&X86_64, &AARCH64] {
            let call = |number, argument| run(machine, machine.architecture, number, argument);
            for number in machine.refused.iter().chain(&MOUNTS) {
                assert_eq!(call(*number, 0), ERRNO | EPERM, "{number}");
            }
            assert_eq!(call(425, 0), ERRNO | ENOSYS);
            for family in FAMILIES {
                assert_eq!(call(machine.socket, family), ALLOW, "{family}");
            }
            for family in [0, 17, 38, 40] {
                assert_eq!(call(machine.socket, family), ERRNO | EAFNOSUPPORT, "{family}");
            }
            assert_eq!(run(machine, 0x4000_0003, 3, 0), ERRNO | ENOSYS, "32-bit calls have other numbers");
        }
        for number in [0, 1, 2, 9, 56, 57, 59, 101, 231, 257, 435] {
            assert_eq!(run(&X86_64, X86_64.architecture, number, 40), ALLOW, "{number}");
        }
        assert_eq!(run(&X86_64, X86_64.architecture, 0x4000_0029, 40), ERRNO | ENOSYS, "socket by the x32 ABI");
    }
}
