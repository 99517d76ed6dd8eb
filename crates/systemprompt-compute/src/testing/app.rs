//! An application that does on request what tenants' applications may do.
//!
//! It listens on `HOST:PORT`. The variable `TEST_APP` says what it does at start:
//! `serve` (default), `exit:N`, `allocate:MIB`, `stubborn` (serves, ignores SIGTERM).
//!
//! | request | does |
//! |---|---|
//! | `/api/v1/health` | answers 200 |
//! | `/read?PATH` | the file's content, or 500 and the error |
//! | `/write?PATH` | makes the file, or 500 and the error |
//! | `/list?PATH` | names in the directory |
//! | `/link?PATH` | where a symbolic link points |
//! | `/dial?ADDRESS,…` | of each TCP address, `@abstract` or `/path` socket: `ADDRESS open` or the error |
//! | `/resolve?ADDRESS` | sends a DNS query by UDP and says whether an answer came |
//! | `/spray?IP` | sends a datagram to each of 10,000 ports there and says how many went out |
//! | `/flood?LINES` | answers at once and prints that many numbered lines of 100 bytes |
//! | `/allocate?MIB` | takes that much memory and touches it |
//! | `/tasks?N` | starts that many threads and says how many started |
//! | `/exit?CODE` | ends |
//! | `/socket?FAMILY` | makes a socket of that number's family, or 500 and the error |
//! | `/namespaces` | tries to make a user namespace: the error number, or 0 |
//! | `/daemon` | leaves a process of its own in the background |

use rustix::net::{AddressFamily, SocketType};
use std::{
    fmt::Write as _,
    fs,
    io::{self, BufRead, BufReader, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr as UnixAddress, UnixStream},
    },
    process::{Command, ExitCode, exit},
    sync::mpsc,
    thread,
    time::Duration,
};

/// How long a dial may take: what is dropped by a firewall never answers.
const DIAL_TIMEOUT: Duration = Duration::from_millis(1500);

/// The application's `main`.
#[allow(clippy::exit, reason = "a test application ends from any thread")]
pub fn app_main() -> ExitCode {
    let behaviour = std::env::var("TEST_APP").unwrap_or_default();
    say(&format!("started {behaviour}"));
    match behaviour.split_once(':') {
        Some(("exit", code)) => return ExitCode::from(code.parse::<u8>().unwrap_or(255)),
        Some(("unshare", _)) => return new_user_namespace(),
        Some(("allocate", mib)) => drop(allocate(mib.parse().unwrap_or(0))),
        Some(("sleep", _)) => loop {
            thread::park();
        },
        _ => {}
    }
    let stubborn = behaviour == "stubborn";
    let (ready, handles) = mpsc::channel();
    thread::spawn(move || on_terminate(stubborn, &ready));
    // Whoever is answered may ask it to end at once.
    if handles.recv().is_err() {
        return ExitCode::from(97);
    }
    let host = std::env::var("HOST").unwrap_or_default();
    let port = std::env::var("PORT").unwrap_or_default();
    let listener = match TcpListener::bind(format!("{host}:{port}")) {
        Ok(listener) => listener,
        Err(error) => {
            say(&format!("cannot listen on {host}:{port}: {error}"));
            return ExitCode::from(98);
        }
    };
    say("listening");
    for stream in listener.incoming().flatten() {
        thread::spawn(move || drop(serve(stream)));
    }
    ExitCode::SUCCESS
}

#[allow(clippy::exit, reason = "a test application ends from any thread")]
fn on_terminate(stubborn: bool, ready: &mpsc::Sender<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let kind = tokio::signal::unix::SignalKind::terminate();
        let mut terminate = tokio::signal::unix::signal(kind).expect("handler");
        let _ = ready.send(());
        loop {
            terminate.recv().await;
            say("asked to terminate");
            if !stubborn {
                exit(0);
            }
        }
    });
}

fn serve(mut stream: TcpStream) -> io::Result<()> {
    let mut line = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut line)?;
    let target = line.split(' ').nth(1).unwrap_or_default();
    let (path, argument) = target.split_once('?').unwrap_or((target, ""));
    let (status, body) = match answer(path, argument) {
        Ok(body) => ("200 OK", body),
        Err(error) => ("500 Internal Server Error", error.to_string()),
    };
    let length = body.len();
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
}

#[allow(clippy::exit, reason = "a test application ends from any thread")]
fn answer(path: &str, argument: &str) -> io::Result<String> {
    let number = || argument.parse::<usize>().map_err(io::Error::other);
    match path {
        "/api/v1/health" => Ok("{\"status\":\"ok\"}".to_owned()),
        "/read" => fs::read(argument).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
        "/write" => fs::write(argument, "written").map(|()| "written".to_owned()),
        "/link" => fs::read_link(argument).map(|target| target.display().to_string()),
        "/list" => {
            fs::read_dir(argument)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned() + "\n")).collect()
        }
        "/dial" => Ok(dial_all(argument)),
        "/resolve" => resolve(argument),
        "/spray" => spray(argument),
        "/flood" => {
            let lines = number()?;
            thread::spawn(move || (0..lines).for_each(|line| say(&format!("{line:09} {}", "x".repeat(89)))));
            Ok(String::new())
        }
        "/allocate" => Ok(allocate(number()?).len().to_string()),
        "/tasks" => Ok(start_tasks(number()?).to_string()),
        "/socket" => {
            let family = AddressFamily::from_raw(u16::try_from(number()?).map_err(io::Error::other)?);
            rustix::net::socket(family, SocketType::STREAM, None)?;
            Ok("made".to_owned())
        }
        "/namespaces" => {
            let status = Command::new(std::env::current_exe()?).arg("app").env("TEST_APP", "unshare:").status()?;
            Ok(status.code().unwrap_or(-1).to_string())
        }
        "/daemon" => {
            let program = std::env::current_exe()?;
            Command::new(program).arg("app").env("TEST_APP", "sleep:").spawn().map(|child| child.id().to_string())
        }
        "/exit" => exit(i32::try_from(number()?).unwrap_or(1)),
        _ => Err(io::Error::other("unknown request")),
    }
}

fn dial_all(addresses: &str) -> String {
    let dials: Vec<_> = addresses
        .split(',')
        .filter(|address| !address.is_empty())
        .map(|address| {
            let address = address.to_owned();
            thread::spawn(move || match dial(&address) {
                Ok(()) => format!("{address} open\n"),
                Err(error) => format!("{address} {error}\n"),
            })
        })
        .collect();
    dials.into_iter().map(|dial| dial.join().unwrap_or_default()).collect()
}

fn dial(address: &str) -> io::Result<()> {
    if let Some(name) = address.strip_prefix('@') {
        return UnixStream::connect_addr(&UnixAddress::from_abstract_name(name)?).map(drop);
    }
    if address.starts_with('/') {
        return UnixStream::connect(address).map(drop);
    }
    let address: SocketAddr = address.parse().map_err(io::Error::other)?;
    TcpStream::connect_timeout(&address, DIAL_TIMEOUT).map(drop)
}

/// A query for the root's name servers: 12 bytes of header, an empty name, type NS, class IN.
fn resolve(server: &str) -> io::Result<String> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(DIAL_TIMEOUT))?;
    socket.send_to(&[0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1], server)?;
    let mut buffer = [0; 1500];
    let count = socket.recv(&mut buffer)?;
    Ok(format!("{count} bytes"))
}

/// To a port each; what a firewall drops on its way out is an error here.
fn spray(address: &str) -> io::Result<String> {
    let address: Ipv4Addr = address.parse().map_err(io::Error::other)?;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let sent = (1..=10_000_u16).filter(|port| socket.send_to(b"x", (address, *port)).is_ok()).count();
    Ok(sent.to_string())
}

fn allocate(mib: usize) -> Vec<u8> {
    let mut memory = vec![0_u8; mib << 20];
    for page in memory.chunks_mut(4096) {
        page[0] = 1;
    }
    memory
}

fn start_tasks(wanted: usize) -> usize {
    let start = |_: &usize| thread::Builder::new().stack_size(64 << 10).spawn(thread::park).is_ok();
    (0..wanted).take_while(start).count()
}

#[allow(deprecated, reason = "nothing is done with descriptors afterwards")]
fn new_user_namespace() -> ExitCode {
    match rustix::thread::unshare(rustix::thread::UnshareFlags::NEWUSER) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(u8::try_from(error.raw_os_error()).unwrap_or(255)),
    }
}

/// One write per line, as a logger does it.
fn say(text: &str) {
    let mut line = String::with_capacity(text.len() + 1);
    let _ = writeln!(line, "{text}");
    let _ = io::stdout().lock().write_all(line.as_bytes());
}
