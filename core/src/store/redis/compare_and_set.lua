-- Replaces what begins with what was expected. KEYS: the key. ARGV: "1" where something is expected, that, the value,
-- milliseconds to keep it.
local found = redis.call('GET', KEYS[1])
local matches = not found
if ARGV[1] == '1' then
    matches = found and string.sub(found, 1, #ARGV[2]) == ARGV[2]
end
if not matches then
    return 0
end
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
return 1
