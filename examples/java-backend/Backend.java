import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpsConfigurator;
import com.sun.net.httpserver.HttpsServer;
import java.io.ByteArrayInputStream;
import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.net.InetSocketAddress;
import java.net.URLConnection;
import java.net.URLDecoder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.GeneralSecurityException;
import java.security.KeyStore;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.UUID;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import javax.net.ssl.KeyManagerFactory;
import javax.net.ssl.SSLContext;

/**
 * A stand-in for the product's Java servers: a broker and a processor node in one process, with HTTPS from a keystore.
 * It takes the secret in the header "secret" alone, as documented from version 2.2.1 on. It needs nothing but a JDK, of
 * version 11 or later.
 */
public final class Backend {
    private static final String USAGE = "usage: java Backend.java --keystore FILE --password PASSWORD --secret SECRET"
        + " [--broker-port N] [--node-port N] [--analysis MILLIS] [--forget MILLIS]";
    private static final String APP_SERVER_ID = "node-1";
    private static final int MAX_BODY = 32 << 20;

    private final byte[] secret;
    private final long analysisNanos;
    private final long forgetNanos;
    private final Map<String, Task> submissions = new ConcurrentHashMap<>();
    private final Map<String, Task> tasks = new ConcurrentHashMap<>();

    public static void main(String[] args) {
        Map<String, String> options = new LinkedHashMap<>();
        options.put("--broker-port", "23001");
        options.put("--node-port", "22001");
        options.put("--analysis", "3000");
        options.put("--forget", "600000");
        List<String> names = new ArrayList<>(options.keySet());
        names.addAll(List.of("--keystore", "--password", "--secret"));
        for (int i = 0; i < args.length; i += 2) {
            if (!names.contains(args[i]) || i + 1 == args.length) {
                exit("unexpected argument " + args[i] + "\n" + USAGE);
            }
            options.put(args[i], args[i + 1]);
        }
        for (String name : names) {
            if (!options.containsKey(name)) {
                exit(name + " is missing\n" + USAGE);
            }
        }
        Backend backend = new Backend(options.get("--secret"), number(options, "--analysis"), number(options, "--forget"));
        int brokerPort = (int) number(options, "--broker-port");
        int nodePort = (int) number(options, "--node-port");
        SSLContext tls = null;
        try {
            tls = tls(Path.of(options.get("--keystore")), options.get("--password").toCharArray());
        } catch (IOException | GeneralSecurityException e) {
            exit("the keystore " + options.get("--keystore") + " cannot be read: " + e);
        }
        try {
            brokerPort = backend.start(tls, brokerPort, true);
            nodePort = backend.start(tls, nodePort, false);
        } catch (IOException | IllegalArgumentException e) {
            exit("the ports " + brokerPort + " and " + nodePort + " cannot be used: " + e);
        }
        System.out.println(json(object("brokerPort", brokerPort, "nodePort", nodePort, "appServerID", APP_SERVER_ID)));
    }

    private static long number(Map<String, String> options, String name) {
        try {
            return Long.parseLong(options.get(name));
        } catch (NumberFormatException e) {
            exit(name + " \"" + options.get(name) + "\" is no number");
            return 0;
        }
    }

    /** Ends the program with an error. */
    private static void exit(String message) {
        System.err.println(message);
        System.exit(2);
    }

    private Backend(String secret, long analysisMillis, long forgetMillis) {
        this.secret = secret.getBytes(StandardCharsets.UTF_8);
        this.analysisNanos = TimeUnit.MILLISECONDS.toNanos(analysisMillis);
        this.forgetNanos = TimeUnit.MILLISECONDS.toNanos(forgetMillis);
    }

    /** Reads the keystore. */
    private static SSLContext tls(Path file, char[] password) throws IOException, GeneralSecurityException {
        KeyStore keys = KeyStore.getInstance("PKCS12");
        try (InputStream in = Files.newInputStream(file)) {
            keys.load(in, password);
        }
        KeyManagerFactory managers = KeyManagerFactory.getInstance(KeyManagerFactory.getDefaultAlgorithm());
        managers.init(keys, password);
        SSLContext context = SSLContext.getInstance("TLS");
        context.init(managers.getKeyManagers(), null, null);
        return context;
    }

    /** Starts the broker or the node, and returns its port. */
    private int start(SSLContext tls, int port, boolean broker) throws IOException {
        HttpsServer server = HttpsServer.create(new InetSocketAddress("127.0.0.1", port), 0);
        server.setHttpsConfigurator(new HttpsConfigurator(tls));
        server.setExecutor(Executors.newCachedThreadPool());
        server.createContext("/", exchange -> serve(exchange, broker));
        server.start();
        return server.getAddress().getPort();
    }

    /** Answers a request. */
    private void serve(HttpExchange exchange, boolean broker) throws IOException {
        long start = System.nanoTime();
        forget(start);
        try {
            Object document = document(exchange, broker, start);
            if (document == null) {
                exchange.sendResponseHeaders(204, -1);
            } else {
                send(exchange, 200, "application/json", json(document));
            }
        } catch (Refusal refusal) {
            sendError(exchange, refusal);
        } catch (RuntimeException e) {
            sendError(exchange, new Refusal(500, "Server Error"));
        } finally {
            exchange.close();
        }
    }

    /** Returns the document that answers a request; null if there is nothing to report yet. */
    private Object document(HttpExchange exchange, boolean broker, long start) throws IOException, Refusal {
        String given = exchange.getRequestHeaders().getFirst("secret");
        if (given == null || !MessageDigest.isEqual(given.getBytes(StandardCharsets.UTF_8), secret)) {
            throw new Refusal(400, "Bad Request");
        }
        String path = exchange.getRequestURI().getPath();
        boolean submits = broker && path.equals("/submit");
        boolean known = submits || path.equals("/task") || path.equals("/system-info") || broker && path.equals("/submit-result");
        if (!known) {
            throw new Refusal(404, "Not Found");
        }
        if (!exchange.getRequestMethod().equals(submits ? "POST" : "GET")) {
            throw new Refusal(405, "Method Not Allowed");
        }
        Map<String, String> query = query(exchange.getRequestURI().getRawQuery());
        switch (path) {
            case "/submit":
                return submit(exchange, start);
            case "/submit-result":
                return submitResult(query, start);
            case "/task":
                return broker ? brokerTask(query, start) : nodeTask(query, start);
            default:
                return systemInfo(broker, start);
        }
    }

    /** Deletes the tasks whose time is over, and their submissions. */
    private void forget(long now) {
        submissions.values().removeIf(task -> task.isForgotten(now));
        tasks.values().removeIf(task -> task.isForgotten(now));
    }

    // The broker.

    /** Accepts one file. */
    private Object submit(HttpExchange exchange, long start) throws IOException, Refusal {
        byte[] body = exchange.getRequestBody().readNBytes(MAX_BODY + 1);
        if (body.length > MAX_BODY) {
            throw new Refusal(413, "Payload Too Large");
        }
        Upload upload = Upload.parse(exchange.getRequestHeaders().getFirst("Content-Type"), body);
        if (upload == null) {
            throw new Refusal(400, "Bad Request");
        }
        long ahead = submissions.values().stream().filter(other -> other.state(start).equals("QUEUED")).count();
        Task task = new Task(upload, start);
        submissions.put(task.submitID, task);
        tasks.put(task.taskID, task);
        return object(
            "processTime", millisSince(start),
            "acceptedFiles", List.of(object(
                "ID", task.submitID, "submitName", task.name, "sha256", task.digests.get("SHA-256"),
                "mediaType", task.mediaType(), "positionInQueue", ahead)),
            "rejectedFiles", List.of(),
            "submitWarnings", List.of());
    }

    /** Answers what the manual shows, which is the example of /file by mistake: no state and no ID. */
    private Object submitResult(Map<String, String> query, long start) throws Refusal {
        Task task = find(submissions, required(query, "submitID"));
        return object("processTime", millisSince(start), "fileSize", task.size, "mediaType", task.mediaType(), "digests", task.digests);
    }

    /** Answers with the report of a submission, or of a task of the node. */
    private Object brokerTask(Map<String, String> query, long start) throws Refusal {
        bool(query, "nocache"); // broker and node share the reports, so there is nothing to fetch again
        boolean all = bool(query, "all");
        Task task;
        if (query.containsKey("submitID")) {
            task = find(submissions, query.get("submitID"));
        } else {
            String appServerID = required(query, "appServerID");
            task = find(tasks, required(query, "taskID"));
            if (!appServerID.equals(APP_SERVER_ID) || task.state(start).equals("QUEUED")) {
                throw new Refusal(404, "Not Found");
            }
        }
        if (task.state(start).equals("QUEUED")) {
            return null;
        }
        Map<String, Object> result = task.report(start, all);
        if (task.state(start).equals("SUCCESS")) {
            result.put("finalVerdict", object("verdict", "UNKNOWN", "threatLevel", 0, "confidence", 0));
        }
        return object("processTime", millisSince(start), "result", result);
    }

    // The node.

    /** Answers with the report of a task. The node knows it when it is queued no longer. */
    private Object nodeTask(Map<String, String> query, long start) throws Refusal {
        boolean all = bool(query, "all");
        Task task = find(tasks, required(query, "taskID"));
        if (task.state(start).equals("QUEUED")) {
            throw new Refusal(404, "Not Found");
        }
        return object("processTime", millisSince(start), "result", task.report(start, all));
    }

    // Both.

    private Object systemInfo(boolean broker, long now) {
        int queued = 0;
        int active = 0;
        int completed = 0;
        for (Task task : tasks.values()) {
            switch (task.state(now)) {
                case "QUEUED":
                    queued++;
                    break;
                case "IN_PROGRESS":
                    active++;
                    break;
                default:
                    completed++;
            }
        }
        Runtime runtime = Runtime.getRuntime();
        Map<String, Object> info = object(
            "versionInfo", object("name", broker ? "fsBroker" : "fsTransform", "version", System.getProperty("java.version")),
            "queueInfo", broker
                ? object("queueCount", queued)
                : object("activeCount", active, "queueCount", 0, "completedCount", completed),
            "memoryStats", object(
                "usedMemory", runtime.totalMemory() - runtime.freeMemory() >> 20, "totalMemory", runtime.totalMemory() >> 20),
            "freeDiscSpaceInMb", new File(System.getProperty("java.io.tmpdir")).getUsableSpace() >> 20);
        if (!broker) {
            info.put("activeThreads", Thread.activeCount());
        }
        return info;
    }

    /** A file under analysis. Its state follows from the time: half of the analysis it is queued, half it is in progress. */
    private final class Task {
        final String submitID = UUID.randomUUID().toString();
        final String taskID = UUID.randomUUID().toString();
        final long submitTime = System.currentTimeMillis();
        final long submitted;
        final String name;
        final int size;
        final String type;
        final Map<String, Object> digests = new LinkedHashMap<>();

        Task(Upload upload, long now) throws IOException {
            submitted = now;
            name = upload.name;
            size = upload.content.length;
            String guess = URLConnection.guessContentTypeFromStream(new ByteArrayInputStream(upload.content));
            if (guess == null) {
                guess = URLConnection.guessContentTypeFromName(name);
            }
            type = guess == null ? "application/octet-stream" : guess;
            for (String algorithm : List.of("MD5", "SHA-1", "SHA-256", "SHA-512")) {
                digests.put(algorithm, digest(algorithm, upload.content));
            }
        }

        String state(long now) {
            if (now - submitted < analysisNanos / 2) {
                return "QUEUED";
            }
            return now - submitted < analysisNanos ? "IN_PROGRESS" : "SUCCESS";
        }

        boolean isForgotten(long now) {
            return now - submitted >= analysisNanos + forgetNanos;
        }

        Object mediaType() {
            return object("string", type, "slash", type.indexOf('/'), "semicolon", type.length());
        }

        /** Returns the result as the node has it: the final verdict is the broker's. */
        Map<String, Object> report(long now, boolean all) {
            String state = state(now);
            boolean finished = state.equals("SUCCESS");
            Map<String, Object> file = object("name", name, "hash", digests.get("SHA-256"), "fileSize", size);
            Map<String, Object> result = object(
                "taskReference", object(
                    "name", "transform-file",
                    "additionalInfo", object(
                        "submitName", name, "submitTime", submitTime, "digests", object("SHA-256", digests.get("SHA-256"))),
                    "ID", taskID, "state", state, "opcount", 1,
                    "processTime", TimeUnit.NANOSECONDS.toMillis(Math.min(now - submitted, analysisNanos))),
                "subtaskReferences", List.of(object("name", "digests", "ID", taskID + "-digests", "state", state)),
                "overallState", finished ? "success" : "in_progress",
                "file", file);
            if (finished) {
                file.put("type", type);
            }
            if (finished && all) {
                result.put("resources", object(taskID + "-file", object(
                    "submitName", name, "fileSize", size, "mediaType", mediaType(), "digests", digests)));
            }
            return result;
        }
    }

    private static String digest(String algorithm, byte[] content) {
        StringBuilder hex = new StringBuilder();
        try {
            for (byte b : MessageDigest.getInstance(algorithm).digest(content)) {
                hex.append(String.format("%02x", b));
            }
        } catch (GeneralSecurityException e) {
            throw new IllegalStateException(e); // every JDK has them
        }
        return hex.toString();
    }

    /** The file in a multipart form. */
    private static final class Upload {
        private static final Pattern BOUNDARY = Pattern.compile("boundary=(?:\"([^\"]+)\"|([^;\\s]+))", Pattern.CASE_INSENSITIVE);
        private static final Pattern FILE_NAME = Pattern.compile("filename=(?:\"((?:\\\\.|[^\"])*)\"|([^;\\r\\n]+))", Pattern.CASE_INSENSITIVE);

        final String name;
        final byte[] content;

        private Upload(String name, byte[] content) {
            this.name = name;
            this.content = content;
        }

        /** Returns the first part that has a file name, whatever its field is called; null if there is none. */
        static Upload parse(String contentType, byte[] body) {
            Matcher boundary = BOUNDARY.matcher(contentType == null ? "" : contentType);
            if (!boundary.find()) {
                return null;
            }
            String form = new String(body, StandardCharsets.ISO_8859_1); // one character for each byte
            String delimiter = "--" + group(boundary);
            int part = form.indexOf(delimiter);
            while (part >= 0) {
                int head = part + delimiter.length();
                int headEnd = form.indexOf("\r\n\r\n", head);
                if (headEnd < 0) {
                    return null;
                }
                int next = form.indexOf("\r\n" + delimiter, headEnd + 2);
                int contentEnd = next < 0 ? form.length() : Math.max(next, headEnd + 4);
                Matcher name = FILE_NAME.matcher(form.substring(head, headEnd));
                if (name.find()) {
                    byte[] utf8 = group(name).getBytes(StandardCharsets.ISO_8859_1);
                    byte[] content = form.substring(headEnd + 4, contentEnd).getBytes(StandardCharsets.ISO_8859_1);
                    return new Upload(new String(utf8, StandardCharsets.UTF_8).replaceAll("\\\\(.)", "$1"), content);
                }
                part = next < 0 ? -1 : next + 2;
            }
            return null;
        }

        private static String group(Matcher matcher) {
            return matcher.group(1) != null ? matcher.group(1) : matcher.group(2);
        }
    }

    /** A request that is answered with an error. */
    private static final class Refusal extends Exception {
        private static final long serialVersionUID = 1;

        final int status;

        Refusal(int status, String reason) {
            super(reason);
            this.status = status;
        }
    }

    private static Map<String, String> query(String raw) throws Refusal {
        Map<String, String> query = new LinkedHashMap<>();
        for (String pair : raw == null ? new String[0] : raw.split("&")) {
            String[] parts = pair.split("=", 2);
            try {
                query.putIfAbsent(decode(parts[0]), parts.length == 2 ? decode(parts[1]) : "");
            } catch (IllegalArgumentException e) {
                throw new Refusal(400, "Bad Request");
            }
        }
        return query;
    }

    private static String decode(String text) {
        return URLDecoder.decode(text, StandardCharsets.UTF_8);
    }

    private static String required(Map<String, String> query, String name) throws Refusal {
        String value = query.getOrDefault(name, "");
        if (value.isEmpty()) {
            throw new Refusal(400, "Bad Request");
        }
        return value;
    }

    private static boolean bool(Map<String, String> query, String name) throws Refusal {
        String value = query.getOrDefault(name, "false");
        if (!value.equalsIgnoreCase("true") && !value.equalsIgnoreCase("false")) {
            throw new Refusal(400, "Bad Request");
        }
        return value.equalsIgnoreCase("true");
    }

    private static Task find(Map<String, Task> tasks, String id) throws Refusal {
        Task task = tasks.get(id);
        if (task == null) {
            throw new Refusal(404, "Not Found");
        }
        return task;
    }

    private static long millisSince(long start) {
        return TimeUnit.NANOSECONDS.toMillis(System.nanoTime() - start);
    }

    /** Sends an error page as Java servers have it. */
    private static void sendError(HttpExchange exchange, Refusal refusal) throws IOException {
        String title = "Error " + refusal.status + " " + refusal.getMessage();
        send(exchange, refusal.status, "text/html;charset=iso-8859-1", "<html>\n<head>\n<title>" + title
            + "</title>\n</head>\n<body><h2>HTTP ERROR " + refusal.status + "</h2>\n<p>Reason: " + refusal.getMessage()
            + "</p>\n</body>\n</html>\n");
    }

    private static void send(HttpExchange exchange, int status, String contentType, String text) throws IOException {
        byte[] body = text.getBytes(StandardCharsets.UTF_8);
        boolean head = exchange.getRequestMethod().equals("HEAD");
        exchange.getResponseHeaders().set("Content-Type", contentType);
        exchange.sendResponseHeaders(status, head ? -1 : body.length);
        if (!head) {
            exchange.getResponseBody().write(body);
        }
    }

    /** Returns a map of names and values that keeps their order. */
    private static Map<String, Object> object(Object... namesAndValues) {
        Map<String, Object> object = new LinkedHashMap<>();
        for (int i = 0; i < namesAndValues.length; i += 2) {
            object.put((String) namesAndValues[i], namesAndValues[i + 1]);
        }
        return object;
    }

    private static String json(Object value) {
        StringBuilder text = new StringBuilder();
        write(text, value);
        return text.toString();
    }

    private static void write(StringBuilder text, Object value) {
        if (value instanceof Map) {
            String separator = "{";
            for (Map.Entry<?, ?> field : ((Map<?, ?>) value).entrySet()) {
                text.append(separator);
                write(text, field.getKey());
                text.append(':');
                write(text, field.getValue());
                separator = ",";
            }
            text.append(separator.equals("{") ? "{}" : "}");
        } else if (value instanceof List) {
            String separator = "[";
            for (Object element : (List<?>) value) {
                text.append(separator);
                write(text, element);
                separator = ",";
            }
            text.append(separator.equals("[") ? "[]" : "]");
        } else if (value instanceof String) {
            writeString(text, (String) value);
        } else {
            text.append(value); // a number
        }
    }

    private static void writeString(StringBuilder text, String value) {
        text.append('"');
        for (char c : value.toCharArray()) {
            if (c == '"' || c == '\\') {
                text.append('\\').append(c);
            } else if (c < ' ' || Character.isSurrogate(c)) {
                text.append(String.format("\\u%04x", (int) c));
            } else {
                text.append(c);
            }
        }
        text.append('"');
    }
}
