//! A tenant's app that misbehaves on request: `/app/services/behaviour` says how.
//!
//! | behaviour | does |
//! |---|---|
//! | `healthy` | answers every path with 200 and the behaviour file's second line; `/slow` after three seconds, `/hold` without an end |
//! | `crash` | writes a line and ends with code 7 |
//! | `sick` | answers every path with 500 |
//! | `silent` | listens and never answers |
//! | `lines` | mortal, and writes 10 MB of numbered lines, for some seconds, as soon as `/write` is asked for |
//! | `mortal` | healthy, and ends with code 9 when asked for `/die`, with code 0 when asked for `/leave` |
//! | `dial` | healthy; `/dial` tries every `host:port`, `udp:host:port`, `unix:path` and `unix:@abstract` of the query and
//! | | lists those that answered |

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::exit, reason = "it is an app: its output is under test")]

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream, ToSocketAddrs as _, UdpSocket},
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixStream},
    },
    process::ExitCode,
    thread,
    time::Duration,
};

fn main() -> ExitCode {
    let file = std::fs::read_to_string("/app/services/behaviour").unwrap_or_default();
    let behaviour = file.lines().next().unwrap_or("healthy").to_owned();
    let text = file.lines().nth(1).unwrap_or("ok").to_owned();
    println!("behaviour: {behaviour}");
    if behaviour == "crash" {
        eprintln!("the configuration is missing its most important line");
        return ExitCode::from(7);
    }
    let host = std::env::var("HOST").unwrap_or_else(|_| "0.0.0.0".to_owned());
    let port = std::env::var("PORT").unwrap_or_else(|_| "8080".to_owned());
    let listener = match TcpListener::bind(format!("{host}:{port}")) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("cannot listen on {host}:{port}: {error}");
            return ExitCode::FAILURE;
        }
    };
    for connection in listener.incoming().flatten() {
        let (behaviour, text) = (behaviour.clone(), text.clone());
        thread::spawn(move || serve(connection, &behaviour, &text));
    }
    ExitCode::SUCCESS
}

/// Keep-alive, one request after the other.
fn serve(connection: TcpStream, behaviour: &str, text: &str) {
    let Ok(reading) = connection.try_clone() else { return };
    let mut reading = BufReader::new(reading);
    let mut writing = connection;
    loop {
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            match reading.read_line(&mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) if line == "\r\n" => break,
                Ok(_) => head.push(line),
            }
        }
        if behaviour == "silent" {
            thread::sleep(Duration::from_hours(1));
        }
        let length =
            head.iter().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
        if std::io::copy(&mut reading.by_ref().take(length.unwrap_or(0)), &mut std::io::sink()).is_err() {
            return;
        }
        let target = head.first().and_then(|line| line.split(' ').nth(1)).unwrap_or("/").to_owned();
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let body = match path {
            "/write" if behaviour == "lines" => {
                thread::spawn(write_lines);
                "writing".to_owned()
            }
            "/slow" => {
                println!("slowly");
                thread::sleep(Duration::from_secs(3));
                text.to_owned()
            }
            "/hold" => {
                let begun = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-type: text/event-stream\r\n\r\n2\r\n:\n\r\n";
                let _ = writing.write_all(begun.as_bytes()).and_then(|()| reading.read_to_end(&mut Vec::new()));
                return;
            }
            "/die" if matches!(behaviour, "mortal" | "lines") => std::process::exit(9),
            "/leave" if behaviour == "mortal" => std::process::exit(0),
            "/dial" if behaviour == "dial" => dial(query),
            _ => text.to_owned(),
        };
        let status = if behaviour == "sick" { "500 Internal Server Error" } else { "200 OK" };
        let answer =
            format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\ncontent-type: text/plain\r\n\r\n{body}", body.len());
        if writing.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

/// 10 MB in 100,000 numbered lines, in not less than five seconds: a test has to do something meanwhile.
fn write_lines() {
    let mut out = std::io::stdout().lock();
    for number in 0..100_000 {
        if number % 100 == 0 {
            thread::sleep(Duration::from_millis(5));
        }
        if writeln!(out, "line {number:06} {}", "x".repeat(87)).is_err() {
            return;
        }
    }
}

fn dial(query: &str) -> String {
    let answered = thread::scope(|scope| {
        let targets = query.split(',').filter(|target| !target.is_empty());
        let dials: Vec<_> = targets.map(|target| scope.spawn(move || answers(target).then_some(target))).collect();
        dials.into_iter().filter_map(|dial| dial.join().ok().flatten()).collect::<Vec<_>>()
    });
    answered.join(",")
}

fn answers(target: &str) -> bool {
    if let Some(name) = target.strip_prefix("unix:@") {
        let address = SocketAddr::from_abstract_name(name);
        return address.and_then(|address| UnixStream::connect_addr(&address)).is_ok();
    }
    if let Some(path) = target.strip_prefix("unix:") {
        return UnixStream::connect(path).is_ok();
    }
    if let Some(address) = target.strip_prefix("udp:") {
        return datagram(address).is_ok();
    }
    let Ok(mut addresses) = target.to_socket_addrs() else { return false };
    addresses.any(|address| TcpStream::connect_timeout(&address, PATIENCE).is_ok())
}

/// Sends one and waits for one.
fn datagram(address: &str) -> std::io::Result<()> {
    let socket = UdpSocket::bind(if address.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" })?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(b"anybody?")?;
    socket.recv(&mut [0; 64]).map(drop)
}

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_millis(300);
