CREATE TABLE api_keys (
	id VARCHAR(64) NOT NULL, 
	name VARCHAR(200) NOT NULL, 
	hash VARCHAR(64) NOT NULL, 
	created FLOAT NOT NULL, 
	revoked FLOAT, 
	PRIMARY KEY (id), 
	UNIQUE (hash)
);
CREATE TABLE feedback_events (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(64) NOT NULL, 
	response_id VARCHAR(200) NOT NULL, 
	kind VARCHAR(20) NOT NULL, 
	value JSON NOT NULL, 
	user TEXT, 
	surface TEXT, 
	created FLOAT NOT NULL, 
	idempotency_key VARCHAR(200) NOT NULL, 
	body_hash VARCHAR(64) NOT NULL, 
	UNIQUE (id), 
	FOREIGN KEY(response_id) REFERENCES responses (id), 
	UNIQUE (idempotency_key)
);
CREATE TABLE forgotten_events (
	id VARCHAR(64) NOT NULL, 
	forgotten FLOAT NOT NULL, 
	PRIMARY KEY (id)
);
CREATE TABLE lines (
	name VARCHAR(200) NOT NULL, 
	champion INTEGER, 
	created FLOAT NOT NULL, 
	PRIMARY KEY (name)
);
CREATE TABLE registry_events (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	line VARCHAR(200) NOT NULL, 
	action VARCHAR(20) NOT NULL, 
	number INTEGER NOT NULL, 
	previous INTEGER, 
	who TEXT, 
	why TEXT, 
	verdict JSON, 
	created FLOAT NOT NULL, 
	FOREIGN KEY(line) REFERENCES lines (name)
);
CREATE TABLE responses (
	id VARCHAR(200) NOT NULL, 
	created FLOAT NOT NULL, 
	status VARCHAR(20) NOT NULL, 
	model TEXT NOT NULL, 
	line VARCHAR(200), 
	version_id VARCHAR(64), 
	weights_hash VARCHAR(64), 
	adapter_hash VARCHAR(64), 
	template_hash VARCHAR(64), 
	prompt JSON NOT NULL, 
	sampling JSON NOT NULL, 
	token_ids JSON, 
	logprobs JSON, 
	text TEXT, 
	finish_reason VARCHAR(40), 
	user TEXT, 
	surface TEXT, 
	purpose VARCHAR(40) NOT NULL, 
	latency_ms FLOAT, 
	PRIMARY KEY (id)
);
CREATE TABLE schema_steps (
	number INTEGER NOT NULL, 
	about TEXT NOT NULL, 
	applied FLOAT NOT NULL, 
	PRIMARY KEY (number)
);
CREATE TABLE sqlite_sequence(name,seq);
CREATE TABLE trials (
	line VARCHAR(200) NOT NULL, 
	number INTEGER NOT NULL, 
	share FLOAT, 
	event BIGINT NOT NULL, 
	created FLOAT NOT NULL, 
	PRIMARY KEY (line), 
	FOREIGN KEY(line) REFERENCES lines (name)
);
CREATE TABLE turns (
	line VARCHAR(200) NOT NULL, 
	number INTEGER NOT NULL, 
	champion VARCHAR(64), 
	candidate VARCHAR(64), 
	dataset VARCHAR(64), 
	verdict JSON NOT NULL, 
	promoted BOOLEAN NOT NULL, 
	"key" VARCHAR(200), 
	created FLOAT NOT NULL, 
	PRIMARY KEY (line, number), 
	CONSTRAINT one_turn_per_key UNIQUE (line, "key")
);
CREATE TABLE versions (
	line VARCHAR(200) NOT NULL, 
	number INTEGER NOT NULL, 
	artifact_id VARCHAR(64) NOT NULL, 
	base_artifact_id VARCHAR(64), 
	kind VARCHAR(40) NOT NULL, 
	weights_hash VARCHAR(64), 
	figures JSON NOT NULL, 
	lineage JSON NOT NULL, 
	created FLOAT NOT NULL, 
	PRIMARY KEY (line, number), 
	CONSTRAINT one_number_per_artifact UNIQUE (line, artifact_id), 
	FOREIGN KEY(line) REFERENCES lines (name)
);
CREATE INDEX feedback_events_by_time ON feedback_events (created);
CREATE INDEX feedback_events_of_a_response ON feedback_events (response_id);
CREATE INDEX feedback_events_of_a_user ON feedback_events (user);
CREATE INDEX registry_events_of_a_line ON registry_events (line, id);
CREATE INDEX responses_by_time ON responses (created);
CREATE INDEX responses_of_a_line ON responses (line, created);
CREATE INDEX responses_of_a_user ON responses (user);
