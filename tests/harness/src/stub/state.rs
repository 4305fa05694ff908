//! The stub's side of terraform's `http` backend, with the patience that terraform has.

use std::env;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

/// How often terraform tries, and how long it waits in between.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);

pub(super) struct StateStore {
    /// `HOST:PORT`.
    host: String,
    path: String,
    authorization: String,
    lock: String,
    serial: u64,
    lineage: String,
}

impl StateStore {
    pub(super) fn from_environment() -> io::Result<Self> {
        let variable = |name: &str| {
            env::var(name).map_err(|_| io::Error::other(format!("there is no {name}")))
        };
        let address = variable("TF_HTTP_ADDRESS")?;
        let rest = address.strip_prefix("http://").unwrap_or(&address);
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let secret = format!("{}:{}", variable("TF_HTTP_USERNAME")?, variable("TF_HTTP_PASSWORD")?);
        Ok(Self {
            host: host.to_owned(),
            path: format!("/{path}"),
            authorization: STANDARD.encode(secret),
            lock: uuid::Uuid::new_v4().to_string(),
            serial: 0,
            lineage: uuid::Uuid::new_v4().to_string(),
        })
    }

    /// Takes the lock and learns where the state stands.
    pub(super) fn lock(&mut self) -> io::Result<()> {
        let info = json!({"ID": self.lock, "Who": "stub"}).to_string();
        let (status, _) = self.ask("LOCK", &self.path, info.as_bytes())?;
        if status != 200 {
            return Err(io::Error::other(format!("the lock was refused: {status}")));
        }
        let (_, state) = self.ask("GET", &self.path, b"")?;
        if let Ok(state) = serde_json::from_slice::<Value>(&state) {
            self.serial = state["serial"].as_u64().unwrap_or(0);
            self.lineage = state["lineage"].as_str().unwrap_or_default().to_owned();
        }
        Ok(())
    }

    pub(super) fn unlock(&self) {
        let info = json!({"ID": self.lock}).to_string();
        // One that cannot be given back ends with the run.
        let _ = self.ask("UNLOCK", &self.path, info.as_bytes());
    }

    /// Makes the next state.
    pub(super) fn next(&mut self, run: &str) -> (u64, Vec<u8>) {
        self.serial += 1;
        let state = json!({
            "version": 4, "terraform_version": "1.9.8", "serial": self.serial,
            "lineage": self.lineage, "outputs": {}, "resources": [], "check_results": null,
            "stub": run,
        });
        (self.serial, state.to_string().into_bytes())
    }

    /// Writes a state; says whether it was taken.
    pub(super) fn post(&self, state: &[u8]) -> bool {
        let path = format!("{}?ID={}", self.path, self.lock);
        for attempt in 1..=TRIES {
            if let Ok((200, _)) = self.ask("POST", &path, state) {
                return true;
            }
            if attempt < TRIES {
                std::thread::park_timeout(PAUSE * attempt);
            }
        }
        false
    }

    fn ask(&self, method: &str, path: &str, body: &[u8]) -> io::Result<(u16, Vec<u8>)> {
        let mut stream = TcpStream::connect(&self.host)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nauthorization: Basic {}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
            self.host,
            self.authorization,
            body.len()
        )?;
        stream.write_all(body)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let end = answer.windows(4).position(|piece| piece == b"\r\n\r\n");
        let end = end.ok_or_else(|| io::Error::other("the backend answered no HTTP"))?;
        let head = String::from_utf8_lossy(&answer[..end]);
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        Ok((status, answer[end + 4..].to_vec()))
    }
}
