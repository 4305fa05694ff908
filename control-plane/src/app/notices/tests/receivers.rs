//! Real servers on loopback that do as told and remember what they heard.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use super::LIMIT;

/// An HTTP request as it came.
#[derive(Debug)]
pub(super) struct Heard {
    pub(super) head: String,
    pub(super) body: String,
}

impl Heard {
    #[track_caller]
    pub(super) fn header(&self, name: &str) -> &str {
        let found = self.head.lines().find_map(|line| {
            let (own, value) = line.split_once(": ")?;
            own.eq_ignore_ascii_case(name).then_some(value)
        });
        found.unwrap_or_else(|| panic!("no {name} in {}", self.head))
    }
}

/// An HTTP server.
pub(super) struct Http {
    address: std::net::SocketAddr,
    heard: tokio::sync::Mutex<mpsc::Receiver<Heard>>,
    count: Arc<AtomicUsize>,
}

impl Http {
    /// Answers these first, then 200.
    pub(super) async fn start(first: &[u16]) -> Self {
        let left: Mutex<VecDeque<u16>> = Mutex::new(first.iter().copied().collect());
        Self::answering(move || {
            let status = left.lock().unwrap().pop_front().unwrap_or(200);
            Some(format!("HTTP/1.1 {status} x\r\ncontent-length: 2\r\n\r\nok"))
        })
        .await
    }

    pub(super) async fn redirecting(to: &str) -> Self {
        let to = to.to_owned();
        Self::answering(move || {
            Some(format!("HTTP/1.1 302 x\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n"))
        })
        .await
    }

    /// Never answers.
    pub(super) async fn silent() -> Self {
        Self::answering(|| None).await
    }

    async fn answering(answer: impl Fn() -> Option<String> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, heard) = mpsc::channel(64);
        let count = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&count);
        let answer = Arc::new(answer);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (sender, answer) = (sender.clone(), Arc::clone(&answer));
                let counter = Arc::clone(&counter);
                tokio::spawn(async move {
                    let mut stream = BufReader::new(stream);
                    let Some(request) = read(&mut stream).await else { return };
                    counter.fetch_add(1, Ordering::SeqCst);
                    let _ = sender.send(request).await;
                    match answer() {
                        Some(answer) => drop(stream.write_all(answer.as_bytes()).await),
                        None => std::future::pending().await,
                    }
                });
            }
        });
        Self { address, heard: tokio::sync::Mutex::new(heard), count }
    }

    pub(super) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(super) fn heard(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// Waits for so many requests more.
    pub(super) async fn next(&self, count: usize) -> Vec<Heard> {
        let mut heard = self.heard.lock().await;
        let mut all = vec![];
        while all.len() < count {
            let next = tokio::time::timeout(LIMIT, heard.recv()).await;
            all.push(next.expect("no request in time").unwrap());
        }
        all
    }
}

async fn read(stream: &mut BufReader<TcpStream>) -> Option<Heard> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await.ok()? == 0 {
            return None;
        }
    }
    let request = Heard { head, body: String::new() };
    let mut body = vec![0; request.header("content-length").parse().unwrap()];
    stream.read_exact(&mut body).await.ok()?;
    Some(Heard { body: String::from_utf8(body).unwrap(), ..request })
}

/// A mail as it came.
#[derive(Debug, Default)]
pub(super) struct Mail {
    pub(super) from: String,
    pub(super) to: Vec<String>,
    pub(super) data: String,
}

/// A mail server.
pub(super) struct Smtp {
    port: u16,
    mails: tokio::sync::Mutex<mpsc::Receiver<Mail>>,
}

impl Smtp {
    /// Answers these to the first mails, then takes them.
    pub(super) async fn start(first: &[&'static str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, mails) = mpsc::channel(16);
        let mut left: VecDeque<&'static str> = first.iter().copied().collect();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let refusal = left.pop_front();
                if let Some(mail) = converse(BufReader::new(stream), refusal).await {
                    let _ = sender.send(mail).await;
                }
            }
        });
        Self { port, mails: tokio::sync::Mutex::new(mails) }
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    pub(super) async fn next(&self) -> Mail {
        let next = tokio::time::timeout(LIMIT, async { self.mails.lock().await.recv().await });
        next.await.expect("no mail in time").unwrap()
    }
}

/// Takes one mail; none when it was refused.
async fn converse(mut stream: BufReader<TcpStream>, refusal: Option<&'static str>) -> Option<Mail> {
    let mut mail = Mail::default();
    let mut taken = false;
    stream.write_all(b"220 test\r\n").await.ok()?;
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await.ok()? == 0 {
            return taken.then_some(mail);
        }
        let line = line.trim_end();
        let answer = match line.split_once(':') {
            Some(("MAIL FROM", from)) => {
                mail.from = from.split(' ').next().unwrap_or_default().to_owned();
                refusal.unwrap_or("250 ok")
            }
            Some(("RCPT TO", to)) => {
                mail.to.push(to.to_owned());
                "250 ok"
            }
            Some(_) | None if line == "DATA" => {
                stream.write_all(b"354 go\r\n").await.ok()?;
                while !mail.data.ends_with("\r\n.\r\n") {
                    stream.read_line(&mut mail.data).await.ok()?;
                }
                taken = true;
                "250 taken"
            }
            Some(_) | None if line == "QUIT" => "221 bye",
            Some(_) | None => "250 ok",
        };
        stream.write_all(format!("{answer}\r\n").as_bytes()).await.ok()?;
        if line == "QUIT" {
            return taken.then_some(mail);
        }
    }
}
